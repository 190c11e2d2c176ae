"""Attention of many rows to few prompts: each prompt's keys and values are kept once, the rows' own beside them.

transformers would keep a copy of its prompt's keys and values in every row, copy all of them for every new token, and
read each copy again. Here a token's query meets its prompt's keys in one product with those of all other rows of that
prompt, and its own reply's keys in another; one softmax runs over both.

Registered with transformers' attention interface; the rows travel as a keyword argument of the model's forward pass, so
no model class is patched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

_NAME = "spl_shared_prompts"
_ROOM = 64  # tokens that a buffer is taken ahead for


class Replies:
    """Which prompt each row follows, and what each layer keeps.

    Attributes:
        mask: True where a prompt has a token, which end at the right [prompts, L].
        length: tokens that every row has beyond its prompt, without the one that runs.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.length = -1  # prompts run first
        self._layers: dict[nn.Module, _Layer] = {}
        self._prompt_of = torch.arange(len(mask), device=mask.device)  # of each row [n]

    def layer(self, module: nn.Module) -> "_Layer":
        return self._layers[module]

    def begin(self, module: nn.Module, keys: Tensor, values: Tensor) -> None:
        """Keep a layer's keys and values of all prompts [prompts, H, L, D]."""
        self._layers[module] = _Layer(keys, values)

    def move(self, kept: Tensor, moved: Sequence[tuple[int, int]]) -> None:
        """Let row i go on from the old row kept[i]; `moved` has the (i, kept[i]) that differ."""
        if self.length < 0:
            self.length = 0
        elif moved:
            targets, sources = (torch.tensor(side, device=kept.device) for side in zip(*moved, strict=True))
            for layer in self._layers.values():
                layer.copy(sources, targets, len(kept), self.length)
        self._prompt_of = self._prompt_of[kept]
        self._share_out()

    def _share_out(self) -> None:
        """Number the rows of each prompt: `slot_of` is a row's place in [prompts, R], `row_in` the row in a place."""
        order = self._prompt_of.argsort(stable=True)
        counts = torch.bincount(self._prompt_of, minlength=len(self.mask))
        self.most = int(counts.max())
        first = counts.cumsum(0) - counts
        ranks = torch.arange(len(order), device=order.device) - first[self._prompt_of[order]]
        slots = self._prompt_of[order] * self.most + ranks
        self.slot_of = torch.empty_like(order)
        self.slot_of[order] = slots
        self.row_in = order.new_zeros(len(self.mask) * self.most)
        self.row_in[slots] = order
        self.hidden = ~self.mask[self._prompt_of][:, None, None]  # [n, 1, 1, L]

    def to_slots(self, states: Tensor) -> Tensor:
        """Of rows [n, H, G, X], by prompt [prompts, H, R * G, X]; places without a row hold another's."""
        _, heads, groups, width = states.shape
        placed = states[self.row_in].view(len(self.mask), self.most, heads, groups, width)
        return placed.transpose(1, 2).reshape(len(self.mask), heads, self.most * groups, width)

    def to_rows(self, states: Tensor, groups: int) -> Tensor:
        """Back again."""
        prompts, heads, _, width = states.shape
        placed = states.view(prompts, heads, self.most, groups, width).transpose(1, 2)
        return placed.reshape(prompts * self.most, heads, groups, width)[self.slot_of]


class _Layer:
    """Keys and values of the prompts [prompts, H, L, D] and of the rows [n, H, T, D], which have room to grow."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prompt_keys, self.prompt_values = keys.contiguous(), values.contiguous()
        self._keys, self._values = (x.new_empty(0, x.shape[1], 0, x.shape[3]) for x in (keys, values))

    def append(self, keys: Tensor, values: Tensor, at: int) -> None:
        """Put a token's [n, H, 1, D] at an index of every row."""
        self._make_room(len(keys), at + 1)
        self._keys[: len(keys), :, at] = keys[:, :, 0]
        self._values[: len(keys), :, at] = values[:, :, 0]

    def own(self, rows: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self._keys[:rows, :, start:end], self._values[:rows, :, start:end]

    def copy(self, sources: Tensor, targets: Tensor, rows: int, length: int) -> None:
        self._make_room(rows, length)
        for buffer in (self._keys, self._values):
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def _make_room(self, rows: int, length: int) -> None:
        have, _, long, _ = self._keys.shape
        if rows <= have and length <= long:
            return
        rows, length = max(rows, have), max(length + _ROOM, long) if length > long else long
        self._keys, self._values = (_grown(x, rows, length) for x in (self._keys, self._values))


def _grown(buffer: Tensor, rows: int, length: int) -> Tensor:
    bigger = buffer.new_empty(rows, buffer.shape[1], length, buffer.shape[3])
    bigger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return bigger


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    replies: Replies | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [N, H, T, D], key and value [N, H_kv, T, D] -> [N, T, H, D].

    Raises:
        ValueError: the layer asks for something this function does not know (attention sinks, a position bias,
            dropout, a window that only its mask tells of), or the model did not hand the rows on.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout or replies is None:
        raise ValueError(f"shared attention does not know {unknown[0] if unknown else 'this model'}")
    if attention_mask is not None and attention_mask.item() != sliding_window:
        raise ValueError(f"shared attention is not told of the layer's window of {attention_mask.item()} tokens")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast rotary embeddings leave query and key in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if replies.length < 0:
        replies.begin(module, key, value)
        return _prompts(query, key, value, replies.mask, scaling, sliding_window, softcap), None
    replies.layer(module).append(key, value, replies.length)
    grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])  # query heads by the key head they share
    output = _rows(grouped, replies, replies.layer(module), scaling, sliding_window, softcap)
    return output.reshape(len(query), 1, query.shape[1], -1), None


def _prompts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention within the prompts."""
    index = torch.arange(mask.shape[1], device=mask.device)
    behind = index[:, None] - index
    seen = (behind >= 0) & (behind < (window or len(index)))
    # Padding sees itself, or it would be no number.
    seen = (seen & mask[:, None]) | (behind == 0)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, seen[:, None], scale=scaling).transpose(1, 2)
    scores = _capped(query @ key.transpose(2, 3) * scaling, softcap).masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _rows(
    query: Tensor, replies: Replies, layer: _Layer, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one token a row, query [n, H_kv, G, D], to its prompt and to its reply up to itself."""
    rows, _, groups, _ = query.shape
    num, longest = replies.length + 1, replies.mask.shape[1]
    window = window or longest + num
    near = max(0, num - window)  # its reply's first token within the window
    far = min(longest, max(0, longest + num - window))  # and its prompt's
    keys, values = layer.own(rows, near, num)
    prompt_keys, prompt_values = layer.prompt_keys[:, :, far:], layer.prompt_values[:, :, far:]
    query = query * scaling
    to_prompt = replies.to_rows(replies.to_slots(query) @ prompt_keys.transpose(2, 3), groups)
    scores = torch.cat([to_prompt, query @ keys.transpose(2, 3)], -1)
    scores = scores.float() if scores.itemsize < 4 else scores
    if softcap is not None:
        scores = _capped(scores, softcap)
    scores[..., : longest - far].masked_fill_(replies.hidden[..., far:], -torch.inf)
    weights = scores.softmax(-1).to(values.dtype)
    of_prompt, of_reply = weights[..., : longest - far], weights[..., longest - far :]
    output = replies.to_rows(replies.to_slots(of_prompt) @ prompt_values, groups)
    return output.add_(of_reply @ values)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


def _window(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """In place of a mask the window or chunk that it would have been made for: some models tell of it here alone."""
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(_NAME, shared_attention)
AttentionMaskInterface.register(_NAME, _window)


@contextmanager
def attention(model: nn.Module) -> Iterator[None]:
    """Run a block in which a transformers model attends so."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
