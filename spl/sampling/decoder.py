"""Replies that grow token by token, several from each prompt, no step of the model done twice.

Replies that have begun with the same tokens are one row of the batch until they part, and a reply that has ended leaves
it at once. Whoever draws tokens holds, for each of its replies, the row that it is in.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from spl.sampling.shared_prompts import Replies, attention

log = logging.getLogger(__name__)

_ALLOWED_GAP = {torch.float64: 1e-3, torch.float32: 1e-3}  # nats; weights in half precision round more
_fits: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class Decoder(ABC):
    """Prompts and the rows that go on from them.

    Attributes:
        logits: of every row's next token [n, V]; at first a row is a prompt.
        device: of the logits.
    """

    logits: Tensor

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        base = _base_of(model)
        self.model: Any = model
        weight = next(model.parameters())
        # Of a sharded model's weights that lie in the CPU's memory, the device is where they are gathered.
        self.device = torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device
        self.options: dict[str, Any] = {}
        if "logits_to_keep" in signature(base.forward).parameters:
            self.options["logits_to_keep"] = 1
        longest = max(map(len, prompts))
        self.ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)  # of rows; a prompt's at first
        self.mask = torch.arange(longest, device=self.device) >= longest - self.lengths[:, None]  # [prompts, longest]

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Append a token to every reply; those in no row any more are gone.

        Args:
            rows: the row of each reply [m].
            tokens: its next token [m].

        Returns:
            The row of each reply from now on [m].
        """
        vocabulary = self.logits.shape[-1]
        branches, branch_of = torch.unique(rows * vocabulary + tokens, return_inverse=True)
        parents = (branches // vocabulary).tolist()
        places, moved = _places(parents)
        target = torch.tensor(places, device=self.device)
        ids = torch.empty_like(branches)
        ids[target] = branches % vocabulary
        kept = torch.arange(len(parents), device=self.device)
        if moved:
            goes_to, comes_from = (torch.tensor(list(side), device=self.device) for side in zip(*moved, strict=True))
            kept[goes_to] = comes_from
        self.lengths = self.lengths[kept]
        self._move(kept, moved)
        self.logits = self._step(ids)
        self.lengths = self.lengths + 1
        return target[branch_of]

    @abstractmethod
    def _move(self, kept: Tensor, moved: Sequence[tuple[int, int]]) -> None:
        """Let row i go on from the old row kept[i]; `moved` has the (i, kept[i]) that differ."""

    @abstractmethod
    def _step(self, ids: Tensor) -> Tensor:
        """Run the model on the next token of every row [n] -> logits [n, V]."""


def _places(parents: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows for branches, of which as few as can be move.

    A row's first branch stays where it is, the others take the places of rows that ended or new ones at the end. No row
    is written to that one still comes from.

    >>> _places([0, 0, 3])  # row 0 parts in two, rows 1 and 2 have ended
    ([0, 1, 2], [(1, 0), (2, 3)])

    Args:
        parents: the row that each branch comes from, ascending.

    Returns:
        The row of each branch, and (row, row it comes from) of those that moved.
    """
    num = len(parents)
    stays = [parent < num and (k == 0 or parents[k - 1] != parent) for k, parent in enumerate(parents)]
    taken = {parent for parent, stay in zip(parents, stays, strict=True) if stay}
    free = (row for row in range(num) if row not in taken)
    places = [parent if stay else next(free) for parent, stay in zip(parents, stays, strict=True)]
    moved = [(place, parent) for place, parent in zip(places, parents, strict=True) if place != parent]
    return places, moved


class PlainDecoder(Decoder):
    """With the keys and values that transformers keeps, a copy of its prompt's in every row: for any model."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(model, prompts)
        base = _base_of(model)
        # transformers 5.24 renamed the argument.
        name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        self.cache: Any = DynamicCache(config=base.config)
        self.options |= {name: self.cache, "use_cache": True}
        self.logits = self._run(self.ids, (self.mask.long().cumsum(-1) - 1).clamp(min=0))

    def _move(self, kept: Tensor, moved: Sequence[tuple[int, int]]) -> None:
        if moved or len(kept) != len(self.mask):
            self.cache.reorder_cache(kept)  # recurrent layers have it too; rows may become more or fewer
            self.mask = self.mask[kept]

    def _step(self, ids: Tensor) -> Tensor:
        self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        return self._run(ids[:, None], self.lengths[:, None])

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=self.mask.long(), position_ids=positions, **self.options)
        return output.logits[:, -1]  # type: ignore[no-any-return]


class SharedDecoder(Decoder):
    """With a prompt's keys and values once for all of its rows; `shared_prompts` says how."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(model, prompts)
        self.replies = Replies(self.mask)
        self.options |= {"use_cache": False, "replies": self.replies}
        self.logits = self._run(self.ids, (self.mask.long().cumsum(-1) - 1).clamp(min=0))

    def _move(self, kept: Tensor, moved: Sequence[tuple[int, int]]) -> None:
        self.replies.move(kept, moved)

    def _step(self, ids: Tensor) -> Tensor:
        logits = self._run(ids[:, None], self.lengths[:, None])
        self.replies.length += 1
        return logits

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        with attention(_base_of(self.model)):
            output = self.model(input_ids=ids, position_ids=positions, **self.options)
        return output.logits[:, -1]  # type: ignore[no-any-return]


def decoder(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Decoder:
    """The fastest decoder that suits a model, found by trying on its first prompts.

    Args:
        model: a transformers causal language model in evaluation mode, or a PEFT model around one.
        prompts: token ids, at least one each.
    """
    base = _base_of(model)
    if base not in _fits:
        _fits[base] = _agrees(model, [list(prompt[:64]) for prompt in prompts[:2]])
    return (SharedDecoder if _fits[base] else PlainDecoder)(model, prompts)


def _agrees(model: nn.Module, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether both decoders give the same laws at the prompts' ends and after a token, where a row parts."""
    try:
        fast, plain = SharedDecoder(model, prompts), PlainDecoder(model, prompts)
        gap = _gap(fast, plain)
        likely = plain.logits.topk(2).indices
        rows = torch.arange(len(prompts), device=plain.device).repeat_interleave(2)
        for one in (fast, plain):
            one.advance(rows, likely.flatten())
        gap = max(gap, _gap(fast, plain))
    except Exception as error:  # an architecture may refuse in any way it likes
        log.info("Sampled with transformers' own cache: %s: %s.", type(error).__name__, error)
        return False
    if gap > _ALLOWED_GAP.get(next(model.parameters()).dtype, 0.25):
        log.info("Sampled with transformers' own cache, from which a shared one differs by %.2g nats.", gap)
        return False
    return True


def _gap(one: Decoder, other: Decoder) -> float:
    """Largest difference of log-probabilities that matter, in nats; infinite where they are no numbers."""
    laws = [decoder.logits.double().log_softmax(-1).clamp(min=-20) for decoder in (one, other)]
    gap = (laws[0] - laws[1]).abs().max().item()
    return gap if gap == gap else float("inf")


def _base_of(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model
