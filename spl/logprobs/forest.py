"""What each attention kernel needs to know of a forest, made once a batch and used by every layer."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spl.types import PreferenceBatch

Backend = Literal["auto", "sdpa", "flex", "varlen"]

BLOCK = 128  # tokens on a side of a block of FlexAttention's mask


class Gathered(NamedTuple):
    """Every node as a sequence of its own: its tokens are the queries, its path from the root the keys."""

    key_index: Tensor  # [K] tokens of all paths, one path after the other
    query_ends: Tensor  # [nodes + 1] int32, cumulative numbers of queries
    key_ends: Tensor  # [nodes + 1] int32, cumulative numbers of keys
    max_queries: int
    max_keys: int


class Forest:
    """A batch's tries, as attention sees them; travels to every layer as a keyword argument of the decoder.

    Attributes:
        paths: for every node, the numbers of its ancestors and itself, from the root down.
        lengths: tokens of every node; the nodes cover the row in order.
        backend: the kernel asked for.
    """

    def __init__(self, batch: PreferenceBatch, backend: Backend = "auto") -> None:
        self.batch = batch
        self.backend = backend
        self.lengths = [end - start for start, end, _ in batch.nodes]
        self.paths: list[list[int]] = []
        for number, (_, _, parent) in enumerate(batch.nodes):
            self.paths.append([*(self.paths[parent] if parent >= 0 else ()), number])
        self._made: dict[Any, Any] = {}

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """`causal_mask`, kept for the next layer."""
        key = (num_queries, num_keys, window, device)
        if key not in self._made:
            self._made[key] = causal_mask(num_queries, num_keys, window, device)
        mask: Tensor | None = self._made[key]
        return mask

    def gathered(self) -> Gathered:
        """The layout of the kernels for variable lengths."""
        if "gathered" not in self._made:
            device = self.batch.input_ids.device
            tokens = torch.split(torch.arange(self.batch.num_tokens), self.lengths)
            keys = [torch.cat([tokens[n] for n in path]) for path in self.paths]
            num_keys = [len(k) for k in keys]
            self._made["gathered"] = Gathered(
                torch.cat(keys).to(device, non_blocking=True),
                _ends(self.lengths).to(device, non_blocking=True),
                _ends(num_keys).to(device, non_blocking=True),
                max(self.lengths),
                max(num_keys),
            )
        gathered: Gathered = self._made["gathered"]
        return gathered

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask, from the ends and depths of blocks alone: no [T, T] tensor is made."""
        if ("block", window) not in self._made:
            self._made["block", window] = _block_mask(self.batch, window)
        return self._made["block", window]


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """[num_queries, num_keys] bool, True where a query sees a key; None where plain causality says the same.

    The keys are a path of a trie in order of depth, and the queries its last tokens.
    """
    if num_queries == num_keys and (window is None or window >= num_keys):
        return None
    depth = torch.arange(num_keys, device=device)
    back = depth[num_keys - num_queries :, None] - depth[None, :]
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def _ends(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def _block_mask(batch: PreferenceBatch, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    size, end, depth = batch.num_tokens, batch.subtree_end, batch.position_ids
    blocks = -(-size // BLOCK)
    first = torch.arange(blocks, device=end.device) * BLOCK
    last = (first + BLOCK).clamp(max=size) - 1

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        rule = (j <= i) & (i < end[j])
        return rule if window is None else rule & (depth[i] - depth[j] < window)

    def extreme(values: Tensor, sign: int) -> Tensor:
        """[blocks] the largest (sign 1) or smallest (-1) value of each block."""
        padded = torch.nn.functional.pad(values * sign, (0, blocks * BLOCK - size), value=torch.iinfo(torch.int64).min)
        return padded.reshape(blocks, BLOCK).amax(1) * sign

    # Of a pair of blocks: whether some query sees a key, and whether every query sees all keys. Where tries are deeper
    # than a window the first is too generous, which costs time and changes nothing: the rule itself is asked then.
    below = first[:, None] > last[None, :]  # the queries stand after the keys
    some = (below & (extreme(end, 1)[None, :] > first[:, None])) | (first[:, None] == first[None, :])
    every = below & (extreme(end, -1)[None, :] > last[:, None])
    if window is not None:
        some &= extreme(depth, -1)[:, None] - extreme(depth, 1)[None, :] < window
        every &= extreme(depth, 1)[:, None] - extreme(depth, -1)[None, :] < window
    partial = some & ~every
    return BlockMask.from_kv_blocks(*_listed(partial), *_listed(every), BLOCK, seen, (size, size))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of a [queries, keys] choice of blocks, their number [1, 1, queries] and, first, their indices [1, 1, q, k]."""
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]
