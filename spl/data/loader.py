"""Loaders whose batch k is a pure function of (seed, epoch, k, rank, world): a resumed run needs no saved state.

A loader asks for its position when the first batch is drawn, which is after a checkpoint was restored.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from spl.data.budget import Balanced, shuffled
from spl.data.collate import EncodedExample, collate
from spl.data.encode import EncodedData, Report, RowEncoder
from spl.types import PreferenceBatch

log = logging.getLogger(__name__)

Position = Callable[[], tuple[int, int]]
"""The epoch, and the batches of it that are done."""


def beginning() -> tuple[int, int]:
    """The position of a pass that is never resumed."""
    return 0, 0


@dataclass(frozen=True)
class Shuffled:
    """The batches of a training epoch: each rank takes every world-th; a last incomplete round is left out."""

    num_examples: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.num_examples // (self.batch_size * self.world)

    def __call__(self, epoch: int) -> list[list[int]]:
        order = shuffled(self.num_examples, self.seed, epoch)
        size = self.batch_size
        starts = [(k * self.world + self.rank) * size for k in range(len(self))]
        return [order[start : start + size] for start in starts]


@dataclass(frozen=True)
class InOrder:
    """The batches of an evaluation: every example once, and the same number of batches, none empty, on every rank.

    There must be as many examples as ranks. Where batches of one example cannot be shared out so, some hold two.
    """

    num_examples: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return min(-(-self.num_examples // (self.batch_size * self.world)), self.num_examples // self.world)

    def __call__(self, epoch: int) -> list[list[int]]:
        groups = torch.arange(self.num_examples).tensor_split(len(self) * self.world)
        return [group.tolist() for group in groups[self.rank :: self.world]]


class _Resumable:
    """Tells Lightning that a loader goes on where a restored run stood; it has no state to keep for that."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class BatchLoader(_Resumable):
    """Batches of examples that can be addressed."""

    def __init__(
        self,
        examples: EncodedData,
        plan: Shuffled | InOrder | Balanced,
        position: Position = beginning,
        num_workers: int = 0,
    ) -> None:
        self.examples = examples
        self.plan = plan
        self.position = position
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        epoch, done = self.position()
        plan = self.plan
        share = plan.parts / plan.step_size if isinstance(plan, Balanced) else None
        yield from DataLoader(
            self.examples,
            batch_sampler=plan(epoch)[done:],
            collate_fn=partial(collate, share=share),
            **_loading(self.num_workers),
        )


class StreamLoader(_Resumable):
    """Batches of a stream without a length, shuffled within a buffer; a resumed run reads past what was done."""

    def __init__(
        self,
        stream: Any,
        encoder: RowEncoder,
        batch_size: int,
        seed: int,
        buffer_size: int,
        position: Position = beginning,
        num_workers: int = 0,
    ) -> None:
        self.stream = stream.shuffle(seed=seed, buffer_size=buffer_size)
        self.encoder = encoder
        self.batch_size = batch_size
        self.position = position
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[PreferenceBatch]:
        epoch, done = self.position()
        self.stream.set_epoch(epoch)
        loader = DataLoader(
            _EncodedStream(self.stream, self.encoder),
            batch_size=self.batch_size,
            collate_fn=collate,
            drop_last=True,
            **_loading(self.num_workers),
        )
        yield from islice(loader, done, None)


class _EncodedStream(IterableDataset[EncodedExample]):
    def __init__(self, stream: Any, encoder: RowEncoder) -> None:
        self.stream = stream
        self.encoder = encoder

    def __iter__(self) -> Iterator[EncodedExample]:
        rows = ((item["where"], item["row"]) for item in self.stream)
        report = Report()
        for _, encoded in self.encoder.examples(rows, report):
            yield encoded
        if report.skipped or report.too_long or report.cut:
            log.warning("Of an epoch of the stream: %s.", report.describe())


def _loading(num_workers: int) -> dict[str, Any]:
    # Forked workers would inherit the threads of torch and of the tokenizer.
    context = "forkserver" if num_workers else None
    return {
        "num_workers": num_workers,
        "multiprocessing_context": context,
        "pin_memory": torch.cuda.is_available(),
    }
