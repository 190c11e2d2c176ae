"""Three ways to attend over a forest by its one rule, `j <= i < subtree_end[j]`; the machine says which is fastest.

Each takes query [1, H, T, D], key and value [1, H_kv, T, D] and gives [1, T, H, D].
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spl.logprobs.forest import Backend, Forest
from spl.logprobs.linear import widen
from spl.types import UserError


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of query [N, H, q, D] over key and value [N, H_kv, k, D]; mask None is causal with q = k."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        if grouped and mask is not None and query.is_cuda:  # its fused kernels take a mask or grouped heads, not both
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            grouped = False
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril() if mask is None else mask
    scores = widen(scores)
    # The lowest number, not -inf: a padding query sees no key at all, and nan would spread from its value.
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).to(query.dtype)
    return weights @ value.repeat_interleave(groups, 1)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One scaled-dot-product call a node; runs anywhere, in any dtype."""
    # Split once: the gradient of a slice would be a tensor of the whole row's size, for every node.
    keys, values = torch.split(key, forest.lengths, 2), torch.split(value, forest.lengths, 2)
    outputs = []
    for number, q in enumerate(torch.split(query, forest.lengths, 2)):
        path = forest.paths[number]
        k, v = (torch.cat([x[n] for n in path], 2) if len(path) > 1 else x[number] for x in (keys, values))
        mask = forest.mask(q.shape[2], k.shape[2], window, query.device)
        outputs.append(attend(q, k, v, mask, scaling, softcap))
    return torch.cat(outputs, 2).transpose(1, 2)


def flex(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """FlexAttention: one fused kernel that skips the blocks no query of which sees a key."""

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output: Tensor = _flex_attention(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=forest.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=True) if compiled else function


def varlen(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """torch's flash kernel for sequences of many lengths: each node is one, its keys its whole path."""
    layout = forest.gathered()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, D]
    k, v = k[layout.key_index], v[layout.key_index]
    kernel, grouped = _varlen_kernel()
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if grouped:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    output: Tensor = kernel(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.query_ends,
        layout.key_ends,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        # The last query sees the last key, as flash attention has it; keys further back than the window are left out.
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return output[None]


@cache
def _varlen_kernel() -> tuple[Callable[..., Any], bool]:
    """torch's kernel, and whether it takes fewer key heads than query heads (not in torch 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


KERNELS: dict[Backend, Callable[..., Tensor]] = {
    "varlen": varlen,
    "flex": flex,
    "sdpa": sdpa,
}  # in the order in which "auto" tries them


def why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int = 64, softcap: float | None = None
) -> str | None:
    """Why a kernel cannot run on tensors like these, or None where it can."""
    if backend in ("auto", "sdpa"):
        return None
    if device.type != "cuda":
        return f"it trains on CUDA devices alone, and this is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more (Ampere)"
    if backend == "flex":
        from torch.utils._triton import has_triton

        return None if has_triton() else "it is compiled by Triton, which is not installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "its kernel knows no soft-cap of the scores, which this model has"
    if head_dim > 256 or head_dim % 8:
        return f"its kernel takes heads of at most 256 numbers, a multiple of 8, and these have {head_dim}"
    return None


def choose(backend: Backend, query: Tensor, softcap: float | None) -> Backend:
    """The kernel to use.

    Raises:
        UserError: the one asked for cannot run; says why.
    """
    like = (query.device, query.dtype, query.shape[-1], softcap)
    if backend == "auto":
        return next(name for name in KERNELS if why_not(name, *like) is None)
    require(backend, *like)
    return backend


def require(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int = 64, softcap: float | None = None
) -> None:
    """See `why_not`.

    Raises:
        UserError: the kernel cannot run; says why.
    """
    if reason := why_not(backend, device, dtype, head_dim, softcap):
        raise UserError(
            f"model.attention {backend} cannot run: {reason}. Set it to auto, or to sdpa, which always can."
        )
