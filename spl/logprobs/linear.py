"""The vocabulary head, in chunks: log-probability and entropy of chosen tokens without the logits of a whole batch.

A chunk's logits are made, reduced in float32 and dropped. The gradient with respect to the hidden state of an edge is
its upstream gradient times one vector, d log p(target) / d hidden = W[target] - E_p[W], so the forward pass keeps that
vector ([E, H] numbers) and the backward pass of a frozen head is one product, with no logits made again. A trainable
head makes them again, chunk by chunk. `spl/logprobs/sequence.py` is the plain definition this must equal.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Head(NamedTuple):
    """An output embedding and what is done to its logits: `cap * tanh(scale * (W h + b) / cap) / temperature`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0  # not the model's


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal language model, its scale and soft-cap read from the config.

    Raises:
        TypeError: the output embedding is not a plain linear layer.
    """
    language_model: Any = model
    embedding = language_model.get_output_embeddings()
    if type(embedding) is not nn.Linear:
        raise TypeError(f"the output embedding is a {type(embedding).__name__}, not a plain linear layer")
    config = language_model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(embedding.weight, embedding.bias, scale, getattr(config, "final_logit_softcapping", None))


def widen(x: Tensor) -> Tensor:
    """x in the dtype of reductions: float32, or float64 where it came so."""
    return x if x.dtype == torch.float64 else x.float()


_LOW = (torch.bfloat16, torch.float16)


def _for_products(weight: Tensor, hidden: Tensor) -> Tensor:
    """The weight in the dtype of the head's products: half-sized on CUDA, where these can be added up in float32."""
    return weight.to(hidden.dtype) if hidden.is_cuda and hidden.dtype in _LOW else widen(weight)


def _in_autocast(hidden: Tensor) -> Tensor:
    """Under CUDA's autocast in its dtype: norms give float32 even there."""
    cast = hidden.is_cuda and torch.is_autocast_enabled("cuda")
    return hidden.to(torch.get_autocast_dtype("cuda")) if cast else hidden


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, taken in the dtype of b and added up in that of reductions."""
    a = a.to(b.dtype)
    return torch.mm(a, b, out_dtype=torch.float32) if b.dtype in _LOW else a @ b


def _logits(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits [n, V] of hidden [n, H] in the dtype of reductions, and their slope with respect to `W h + b`.

    The slope is None where it is the constant `_slope`.
    """
    raw = _product(hidden, head.weight.t())
    if head.bias is not None:
        raw += widen(head.bias)
    if head.softcap is None:
        return (raw if _slope(head) == 1.0 else raw.mul_(_slope(head))), None
    squashed = torch.tanh(raw * (head.scale / head.softcap))
    return head.softcap / head.temperature * squashed, _slope(head) * (1 - squashed**2)


def _slope(head: Head) -> float:
    """Of the logits with respect to `W h + b`, where there is no cap."""
    return head.scale / head.temperature


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits [n, V] of final hidden states [n, H], in the dtype of reductions; no gradient in place of memory."""
    hidden = _in_autocast(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _logits(hidden, head._replace(weight=_for_products(head.weight, hidden)))[0]


class _Law(NamedTuple):
    """The law of the next token at n positions, and what its target says of it."""

    logps: Tensor  # [n] log p(target)
    entropies: Tensor  # [n]
    weights: Tensor  # [n, V] p times `total`
    total: Tensor  # [n]
    slope: Tensor | None  # [n, V] as of `_logits`


def _law(hidden: Tensor, target: Tensor, head: Head) -> _Law:
    """Two [n, V] buffers and as few passes over them as it takes: the passes cost as much as the products."""
    logits, slope = _logits(hidden, head)
    top = logits.amax(-1, keepdim=True)
    picked = (logits.gather(1, target[:, None]) - top).squeeze(1)
    weights = logits.sub_(top).exp()
    total = weights.sum(-1)
    log_z = total.log()
    mean_logit = logits.mul_(weights).sum(-1) / total
    return _Law(picked - log_z, log_z - mean_logit, weights, total, slope)


def _direction(law: _Law, target: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """d log p(target) / d hidden [n, H]: the target's row of the weight less the mean row under the law."""
    weights, own, weight = law.weights, head.weight[target], head.weight
    if law.slope is None:
        own = _slope(head) * own
    else:
        weights = weights.mul_(law.slope)
        own = law.slope.gather(1, target[:, None]) * own
    mean = _product(weights, weight) / law.total[:, None]
    return (own - (mean if law.slope is not None else _slope(head) * mean)).to(dtype)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, settings: tuple[Any, ...],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = Head(_for_products(weight, hidden), bias, *settings)
        logps, entropies, directions = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for h, y in zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True):
                law = _law(h, y, head)
                logps.append(law.logps)
                entropies.append(law.entropies)
                if ctx.needs_input_grad[0]:
                    directions.append(_direction(law, y, head, h.dtype))
        ctx.settings, ctx.chunk = settings, chunk
        trains = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(
            torch.cat(directions) if directions else None, hidden if trains else None, weight, bias, target
        )
        result = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        directions, hidden, weight, bias, target = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if directions is not None:
            grad_hidden = (directions * grad_logps[:, None]).to(directions.dtype)
        if any(ctx.needs_input_grad[1:3]):
            head = Head(_for_products(weight, hidden), bias, *ctx.settings)
            grad_weight, grad_bias = _head_gradients(hidden, target, grad_logps, head, ctx.chunk)
            grad_weight = grad_weight.to(weight.dtype)
            grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _head_gradients(
    hidden: Tensor, target: Tensor, grad_logps: Tensor, head: Head, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight [V, H] and bias [V] from those of the log-probabilities [E]; the logits are made again."""
    grad_weight = torch.zeros_like(widen(head.weight))
    grad_bias = None if head.bias is None else torch.zeros_like(widen(head.bias))
    pieces = (torch.split(x, chunk) for x in (hidden, target, grad_logps))
    with torch.autocast(hidden.device.type, enabled=False):
        for h, y, g in zip(*pieces, strict=True):
            law = _law(h, y, head)
            gradient = law.weights.mul_((-g / law.total)[:, None])
            gradient[torch.arange(len(y), device=y.device), y] += g
            gradient *= _slope(head) if law.slope is None else law.slope
            states = _for_products(h, h)
            if states.dtype in _LOW:
                grad_weight += _product(gradient.t(), states)
            else:
                grad_weight.addmm_(gradient.t(), states)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
    return grad_weight, grad_bias


def token_logps(hidden: Tensor, target: Tensor, head: Head, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """log p(target | hidden) and the entropy of p(. | hidden), both [E] in nats and float32 (float64 of float64).

    Only the log-probability carries a gradient.

    Args:
        hidden: [E, H] final hidden states of the predicting tokens.
        target: [E] token ids.
        head: the output embedding.
        chunk: edges projected at a time; `chunk * V` float32 logits are held.
    """
    hidden = _in_autocast(hidden)
    logps, entropies = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, target, (head.scale, head.softcap, head.temperature), chunk
    )
    return logps, entropies
