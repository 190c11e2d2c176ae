"""The reward a policy implies under the SPL objective, and its differences."""

from torch import Tensor


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, alpha: float | Tensor, beta: float) -> Tensor:
    """r(x, y) = alpha log pi(y|x) - beta log pi_ref(y|x), up to a constant of the prompt (arXiv 2511.08594).

    Args:
        policy_logps: log pi(y|x), any shape, nats.
        reference_logps: log pi_ref(y|x), the same shape; not looked at where beta is 0.
        alpha: entropy coefficient, a number or a tensor that broadcasts.
        beta: cross-entropy coefficient.
    """
    rewards = alpha * policy_logps
    return rewards if beta == 0 else rewards - beta * reference_logps


def margins(
    policy_logps: Tensor, reference_logps: Tensor, comparisons: Tensor, alpha: float | Tensor, beta: float
) -> Tensor:
    """m = alpha (log pi(y_i) - log pi(y_j)) - beta (log pi_ref(y_i) - log pi_ref(y_j)) for each comparison (i, j).

    Differences are taken before scaling: sums over long responses are large and their differences small.

    Args:
        policy_logps: [R] nats.
        reference_logps: [R] nats; not looked at where beta is 0.
        comparisons: [C, 2] indices into the responses.
        alpha: entropy coefficient, a number or [C].
        beta: cross-entropy coefficient.
    """
    first, second = comparisons.unbind(1)
    policy = alpha * (policy_logps[first] - policy_logps[second])
    return policy if beta == 0 else policy - beta * (reference_logps[first] - reference_logps[second])
