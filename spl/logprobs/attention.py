"""Attention over a forest of token tries, as transformers calls it.

Registered under the name `spl_forest`; the forest travels as a keyword argument of the decoder, so no model class is
patched. A token sees its ancestors in the trie and itself: exactly the rule `j <= i < subtree_end[j]`. Without a forest
the function is ordinary attention under the mask that transformers builds, so that a model set up for forests still
generates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spl.logprobs.forest import Forest, causal_mask
from spl.logprobs.kernels import KERNELS, attend, choose

FOREST = "spl_forest"


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Without a forest, N rows of q queries over k keys, whose mask [N, 1, q, k] (True where seen) knows the window.

    Raises:
        ValueError: the layer asks for something this function does not know (attention sinks, a position bias,
            dropout), or the kernel asked for cannot run.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise ValueError(f"forest attention does not know {unknown[0] if unknown else 'dropout'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if forest is None:
        mask = attention_mask
        if mask is None:
            mask = causal_mask(query.shape[2], key.shape[2], sliding_window, query.device)
        return attend(query, key, value, mask, scaling, softcap).transpose(1, 2), None
    # Under autocast rotary embeddings leave query and key in float32, and of the kernels sdpa alone looks after that.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = KERNELS[choose(forest.backend, query, softcap)]
    return kernel(query, key, value, forest, scaling, sliding_window, softcap), None


def forest_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: no mask for a forest, or for whole unpadded rows; else that of its `sdpa`."""
    if attention_mask is None and q_length == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(FOREST, forest_attention)
AttentionMaskInterface.register(FOREST, forest_mask)


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Run a block with another attention implementation.

    Not around a checkpointed forward pass whose backward pass comes later: that looks the implementation up again.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
