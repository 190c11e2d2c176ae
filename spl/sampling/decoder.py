"""Replies that grow token by token, several from each prompt, no step done twice where a model's cache allows it.

Replies that have begun with the same tokens are one row of the batch until they part, and a reply that has ended leaves
it at once. Whoever draws tokens holds, for each of its replies, the row that it is in.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from spl.sampling.shared_prompts import Replies, attention

log = logging.getLogger(__name__)

_ALLOWED, _ALLOWED_LOW = 1e-3, 0.1  # total variation of laws; products in half precision round more


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
    """With the keys and values that transformers keeps, a copy of its prompt's in every row."""

    masked = True

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
        mask = self.mask.long() if self.masked else None
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **self.options)
        return output.logits[:, -1]  # type: ignore[no-any-return]


class UnmaskedDecoder(PlainDecoder):
    """Without a mask: some recurrent layers take one of the whole text for that of the one token that runs.

    Args:
        prompts: of one length.
    """

    masked = False


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


class WholeDecoder(Decoder):
    """Without a cache, every row's whole text at each step: for models whose state cannot follow rows that part.

    Args:
        prompts: of one length.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(model, prompts)
        self.options["use_cache"] = False
        self.logits = self._run()

    def _move(self, kept: Tensor, moved: Sequence[tuple[int, int]]) -> None:
        self.ids = self.ids[kept]

    def _step(self, ids: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, ids[:, None]], 1)
        return self._run()

    def _run(self) -> Tensor:
        return self.model(input_ids=self.ids, **self.options).logits[:, -1]  # type: ignore[no-any-return]


def decoder(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Decoder:
    """The fastest decoder that suits a model, found by trying on its first prompt.

    Args:
        model: a transformers causal language model in evaluation mode, or a PEFT model around one.
        prompts: token ids, at least one each; of one length where the model does not take padding.
    """
    return _way(model, prompts).decoder(model, prompts)


def takes_padding(model: nn.Module, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether prompts of different lengths may be in one batch: some recurrent layers read the padding too."""
    return _way(model, prompts).padded


class _Way(NamedTuple):
    """A way of decoding."""

    name: str
    decoder: type[Decoder]
    padded: bool  # prompts of different lengths in one batch


_WAYS = (
    _Way("a cache that prompts share", SharedDecoder, True),
    _Way("transformers' own cache", PlainDecoder, True),
    _Way("transformers' own cache, prompt by prompt", UnmaskedDecoder, False),
)
_EXACT = _Way("no cache, prompt by prompt", WholeDecoder, False)
_STEPS = 4  # for which a way is tried
_chosen: WeakKeyDictionary[nn.Module, _Way] = WeakKeyDictionary()


def _way(model: nn.Module, prompts: Sequence[Sequence[int]]) -> _Way:
    """The first that gives the laws of the whole text, at the ends of two texts and along two replies to each.

    The texts are of one prompt, so that every process that holds a part of the model tries the same.
    """
    base = _base_of(model)
    if base not in _chosen:
        most = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 64 + _STEPS
        long = (list(prompts[0]) * 8)[: max(2, min(64, most - _STEPS))]
        texts = [long[: len(long) // 2], long]
        exact = _laws(model, _EXACT, texts)
        _chosen[base] = next((way for way in _WAYS if _agrees(model, way, texts, exact)), _EXACT)
        if _chosen[base] is _EXACT:
            log.warning("%s is sampled without a cache, so that longer replies take ever longer.", type(base).__name__)
    return _chosen[base]


def _agrees(model: nn.Module, way: _Way, texts: Sequence[Sequence[int]], exact: Tensor) -> bool:
    weight = next(model.parameters())
    try:
        gap = (_laws(model, way, texts) - exact).abs().sum(-1).max() / 2  # total variation
    except Exception as error:  # an architecture may refuse in any way it likes
        log.info("Not sampled with %s: %s: %s.", way.name, type(error).__name__, error)
        return False
    if isinstance(weight, DTensor):  # else processes that hold parts of one model could choose apart
        gap = gap.to(weight.device_mesh.device_type, torch.float32)
        torch.distributed.all_reduce(gap, op=torch.distributed.ReduceOp.MAX)
    low = weight.itemsize < 4 or torch.is_autocast_enabled(weight.device.type)
    if agrees := gap.item() <= (_ALLOWED_LOW if low else _ALLOWED):
        return agrees
    log.info("Not sampled with %s, whose laws are off by %.2g in total variation.", way.name, gap)
    return False


def _laws(model: nn.Module, way: _Way, texts: Sequence[Sequence[int]]) -> Tensor:
    """Probabilities, step by step, of two replies to each text [texts, steps + 1, 2, V]."""
    if not way.padded and len(texts) > 1:
        return torch.cat([_laws(model, way, [text]) for text in texts])
    one = way.decoder(model, texts)
    rows = torch.arange(len(texts), device=one.device).repeat_interleave(2)
    found = [one.logits[rows]]
    for step in range(_STEPS):
        tokens = [(text[step % len(text)] + second) % one.logits.shape[-1] for text in texts for second in (0, 1)]
        rows = one.advance(rows, torch.tensor(tokens, device=one.device))
        found.append(one.logits[rows])
    return torch.stack(found).cpu().double().softmax(-1).view(_STEPS + 1, len(texts), 2, -1).transpose(0, 1)


def _base_of(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model
