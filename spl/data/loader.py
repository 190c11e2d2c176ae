"""Loaders whose batch k is a pure function of (seed, epoch, k, rank, world): a resumed run needs no saved state.

A loader asks for its position when the first batch is drawn, which is after a checkpoint was restored.
"""

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from spl.data.budget import Balanced, shuffled
from spl.data.collate import EncodedExample, collate
from spl.data.kept import EncodedData
from spl.types import PreferenceBatch, UserError

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
        loader = DataLoader(
            self.examples,
            batch_sampler=plan(epoch)[done:],
            collate_fn=partial(_collated, share=share),
            **_loading(self.num_workers),
        )
        yield from map(received, loader)


class StreamLoader(_Resumable):
    """Batches of a stream, as many as the run takes. It asks for them when the first is drawn.

    Args:
        batches: gives what is left of the stream, as (batch, note) or the UserError that ends it.
        draw: takes the note of each batch that is handed over.
        length: batches of the run.
        num_workers: processes that prepare them.
    """

    def __init__(
        self, batches: Callable[[], Any], draw: Callable[[Any], None], length: int, num_workers: int = 0
    ) -> None:
        self.batches = batches
        self.draw = draw
        self.length = length
        self.num_workers = num_workers
        self._running: Generator[PreferenceBatch, None, None] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PreferenceBatch]:
        self._running = self._batches()
        return self._running

    def close(self) -> None:
        """End the workers, which would go on without end."""
        if self._running:
            self._running.close()

    def _batches(self) -> Generator[PreferenceBatch, None, None]:
        loader = DataLoader(self.batches(), batch_size=None, collate_fn=_as_it_is, **_loading(self.num_workers))
        for found in islice(loader, self.length):  # a trainer that goes on stops sooner
            if isinstance(found, UserError):
                raise found
            batch, note = found
            self.draw(note)
            yield received(batch)


def _as_it_is(batch: Any) -> Any:
    return batch


def _collated(examples: list[EncodedExample], share: float | None) -> PreferenceBatch:
    return sent(collate(examples, share))


def sent(batch: PreferenceBatch) -> PreferenceBatch:
    """With arrays in place of tensors, of which processes would hand each other every one by a file of its own."""
    parts: list[Any] = [part.numpy() if isinstance(part, torch.Tensor) else part for part in batch]
    return PreferenceBatch(*parts)


def received(batch: PreferenceBatch) -> PreferenceBatch:
    """With tensors again, where a GPU copies from as it works."""
    return PreferenceBatch(*map(_tensor, batch))


def _tensor(part: Any) -> Any:
    if not isinstance(part, np.ndarray):
        return part
    tensor = torch.from_numpy(part)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def killed_worker(error: BaseException) -> str:
    """What to say of an error that tells of a worker's death; nothing of another."""
    reason = str(error).split("\n")[0]
    if not reason.startswith("DataLoader worker"):
        return ""
    return (
        f"a process that prepares batches was killed, most often because memory ran out ({reason.rstrip('. ')}): lower "
        "data.num_workers, data.buffer_size or data.batch_size. Checkpoints saved before are kept; --resume goes on."
    )


def _loading(num_workers: int) -> dict[str, Any]:
    # Forked from this process, workers would inherit the threads of torch and of the tokenizer. They are forked from
    # one that only imports what they need, once for all of them.
    context = get_context("forkserver") if num_workers else None
    if context:
        preloaded = ["spl.data.worker_parent", "spl.data.streaming", "transformers.tokenization_utils_tokenizers"]
        context.set_forkserver_preload(preloaded)
        _keep_tracker()
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _leave_signals_to_the_run}


def _keep_tracker() -> None:
    """Start the process that cleans up after workers deaf to SIGUSR1, which would end it; to the others it is."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal or a scheduler sends its signal to workers as well, whose batches the run needs to finish its step.

    A second SIGTERM ends a worker: that is how the run itself ends one that does not come to its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
