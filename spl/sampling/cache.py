"""Keys and values that grow in place: transformers' own are copied whole for every new token, a third of the time."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens that a buffer is taken ahead for


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [n, heads, T, D] of one layer, as views of buffers with room for more tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._buffers is None or self.get_seq_length() + key_states.shape[-2] > self._buffers[0].shape[-2]:
            keys, values = super().update(key_states, value_states)
            self._buffers = _with_room(keys), _with_room(values)
        else:
            start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
            self._buffers[0][..., start:end, :] = key_states
            self._buffers[1][..., start:end, :] = value_states
            keys, values = (buffer[..., :end, :] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def _with_room(states: Tensor) -> Tensor:
    shape = (*states.shape[:-2], states.shape[-2] + _ROOM, states.shape[-1])
    buffer = states.new_empty(shape)
    buffer[..., : states.shape[-2], :] = states
    return buffer


def growing_cache(config: Any) -> DynamicCache:
    """transformers' cache for a model's config, its plain layers growing in place; others, such as windows, as is."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
