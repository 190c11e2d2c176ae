"""The losses of supervised fine-tuning."""

from torch import Tensor


def imitation_losses(logps: Tensor, entropies: Tensor, gem_temperature: float | None) -> Tensor:
    """Loss of each response [R], nats summed over its tokens: cross-entropy, or GEM (arXiv 2408.16673).

    A token's GEM loss is -sum_v q_v (log f_y - log f_v), with f = softmax(z) of the logits z and q = softmax(z / t)
    held fixed. The normaliser of f cancels, which leaves sum_v q_v z_v - z_y; and since log q_v = z_v / t - log Z,
    the sum is t (log Z - H(q)), so that the loss is -t (log q_y + H(q)). Its gradient with respect to z, q held fixed,
    is q less the one at y, which is that of -t log q_y with q let go and H held fixed. So one pass of the head at
    temperature t gives both the value and the gradient.

    Args:
        logps: [R] log-probabilities; for GEM of the law at its temperature, log q.
        entropies: [R] of the same law, summed over each response's positions; no gradient.
        gem_temperature: t; None for cross-entropy.
    """
    return -logps if gem_temperature is None else -gem_temperature * (logps + entropies)
