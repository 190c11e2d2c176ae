"""Attention over a forest of token tries: one scaled-dot-product call for each unbranched run of tokens.

Registered with transformers under the name `spl_forest`; the forest travels as a keyword argument of the decoder, so no
model class is patched. A node's queries see the keys of its ancestors and, causally, its own: exactly the rule
`j <= i < subtree_end[j]`. Without a forest the function is ordinary attention under the mask that transformers builds,
so that a model set up for forests still generates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spl.logprobs.linear import widen
from spl.types import Node

FOREST = "spl_forest"


class Forest:
    """The nodes of a batch and their attention masks, built once and used by every layer."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Token ranges of a node's ancestors and itself, from the root down."""
        spans = []
        while index >= 0:
            start, end, index = self.nodes[index]
            spans.append((start, end))
        return spans[::-1]

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """[num_queries, num_keys] bool, True where a query sees a key; None where plain causality says the same.

        The keys are a path of the trie in order of depth, and the queries its last tokens.
        """
        if num_queries == num_keys and (window is None or window >= num_keys):
            return None
        key = (num_queries, num_keys, window, device)
        if key not in self._masks:
            depth = torch.arange(num_keys, device=device)
            back = depth[num_keys - num_queries :, None] - depth[None, :]
            self._masks[key] = (back >= 0) if window is None else (back >= 0) & (back < window)
        return self._masks[key]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention of query [N, H, q, D] over key and value [N, H_kv, k, D]; mask None is causal with q = k."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril() if mask is None else mask
    scores = widen(scores)
    # The lowest number, not -inf: a padding query sees no key at all, and nan would spread from its value.
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return weights @ value.repeat_interleave(groups, 1)


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
        ValueError: the layer asks for something this function does not know (attention sinks, a position bias).
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"forest attention does not know {name}")
    if attention_mask is not None:
        return _attend(query, key, value, attention_mask, scaling, softcap, dropout).transpose(1, 2), None
    forest = forest or Forest([Node(0, query.shape[2], -1)])
    outputs = []
    for index, (start, end, parent) in enumerate(forest.nodes):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if parent >= 0:
            spans = forest.spans(index)
            k = torch.cat([key[:, :, a:b] for a, b in spans], 2)
            v = torch.cat([value[:, :, a:b] for a, b in spans], 2)
        mask = forest.mask(end - start, k.shape[2], sliding_window, query.device)
        outputs.append(_attend(q, k, v, mask, scaling, softcap, dropout))
    return torch.cat(outputs, 2).transpose(1, 2), None


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
