"""What is trained on, as a Trainer takes it: a stream that is read as it goes, without end."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import islice, takewhile
from typing import Any

import torch
from lightning import Trainer

from spl.data.collate import EncodedExample, collate
from spl.data.encode import Report, RowEncoder
from spl.data.lanes import Cursor, Lane, deal
from spl.data.loader import StreamLoader
from spl.data.quarantine import Quarantine
from spl.data.settings import retries_of
from spl.data.shards import Shard
from spl.data.source import Source
from spl.data.streaming import LaneProgress, LaneReader, Note, StreamBatches
from spl.types import PreferenceBatch, UserError

log = logging.getLogger(__name__)


class TrainingStream:
    """Rows read and tokenised as training takes them.

    Args:
        sources: of the rows, and the weight of each in the mixture.
        encoder: tokenises them.
        settings: the data module's hyper-parameters.
        trainer: takes the batches.
        quarantine: takes bad rows.
    """

    def __init__(
        self,
        sources: Mapping[Source, float],
        encoder: RowEncoder,
        settings: Mapping[str, Any],
        trainer: Trainer,
        quarantine: Quarantine,
    ) -> None:
        self.sources = sources
        self.encoder = encoder
        self.settings = settings
        self.trainer = trainer
        self.quarantine = quarantine
        self._progress: dict[int, dict[str, Any]] = {}  # of the lanes that have had a batch: all, or this process's
        self._done = 0  # batches of all processes
        self._at_step = self._progress, self._done  # the same when the last optimiser step ended
        self._loader: StreamLoader | None = None
        self._drawn: tuple[Note, int] | None = None  # the newest batch's, and the batches processed before it
        self._begun_with: int | None = None  # lanes of the run that goes on

    def prepare(self) -> None:
        """Check what can be told before the model is loaded.

        Raises:
            UserError: the run has no length, or its lanes cannot be shared out.
        """
        assert self.length and self.num_lanes

    @property
    def length(self) -> int:
        """Batches of the run, on each process.

        Raises:
            UserError: the trainer has no number of steps.
        """
        if self.trainer.max_steps <= 0:
            raise UserError(
                "a stream has no end, and so no epochs: set trainer.max_steps, and leave out trainer.max_epochs."
            )
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @cached_property
    def shards(self) -> list[Sequence[Shard]]:
        """Of each source."""
        return [source.shards(retries_of(self.settings)) for source in self.sources]

    @property
    def num_lanes(self) -> int:
        """Lanes of the stream, which stay what they are when the run goes on with other processes or workers.

        Raises:
            UserError: they cannot be shared out.
        """
        hp = self.settings
        readers = self.trainer.world_size * max(hp["num_workers"], 1)
        number = self._begun_with or hp["lanes"] or readers
        if number % readers:
            raise UserError(
                f"{number} lanes of the stream cannot be shared out to {readers} readers (trainer.devices times "
                "data.num_workers): give a number of them that divides the lanes, which a run keeps from its beginning."
            )
        return int(number)

    def _lanes(self) -> list[tuple[Lane, ...]]:
        """Of every lane, its part of each source."""
        hp = self.settings
        dealt = [
            deal(shards, self.num_lanes, (hp["seed"], source), hp["buffer_size"], retries_of(hp))
            for source, shards in enumerate(self.shards)
        ]
        return list(zip(*dealt, strict=True))

    def _reader(self, lane: int, parts: tuple[Lane, ...], progress: LaneProgress) -> tuple[Any, ...]:
        """What a LaneReader is made of."""
        return parts, tuple(self.sources.values()), (self.settings["seed"], lane), self.encoder, progress

    def batches(self) -> StreamBatches:
        """This process's next ones."""
        self._settle()
        self._drawn = None  # what was drawn and never trained on comes again
        rank, world = self.trainer.global_rank, self.trainer.world_size
        fresh = LaneProgress([Cursor()] * len(self.sources)).state()
        readers = {
            lane: self._reader(lane, parts, LaneProgress.of(self._progress.get(lane, fresh)))
            for lane, parts in enumerate(self._lanes())
            if self._is_own(lane)
        }
        return StreamBatches(readers, self.num_lanes, self.settings["batch_size"], self._done, rank, world)

    def _is_own(self, lane: int) -> bool:
        """Whether the lane is this process's, which takes every world-th batch from the first that is not done."""
        return (lane - self._done) % self.trainer.world_size == self.trainer.global_rank

    def draw(self, note: Note) -> None:
        """A batch is handed over, and the one before it is done."""
        self._settle(done=True)
        self._drawn = note, self._processed
        self.quarantine.add(note.samples)

    def _settle(self, done: bool = False) -> None:
        """Count the newest batch in, once it is trained on: a checkpoint may be taken between that and the draw."""
        if self._drawn and (done or self._processed > self._drawn[1]):
            note, self._drawn = self._drawn[0], None
            self._progress[note.lane] = note.state
            self._done += self.trainer.world_size
            if self._done % (self.trainer.world_size * self.trainer.accumulate_grad_batches) == 0:
                self._at_step = dict(self._progress), self._done

    @property
    def _processed(self) -> int:
        """Batches that training has been through."""
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def loader(self) -> StreamLoader:
        """Batches for the whole run; training that goes on in the same process goes on where it was."""
        trainer, every = self.trainer, self.trainer.check_val_every_n_epoch or 1
        if every > 1 and trainer.limit_train_batches == 1.0 and trainer.global_rank == 0:
            log.warning(
                "A stream has no epochs, so trainer.check_val_every_n_epoch %d means no validation but at the start "
                "and the end: set it to 1 and trainer.val_check_interval to a number of batches.",
                every,
            )
        self._loader = StreamLoader(self.batches, self.draw, self.length, self.settings["num_workers"])
        return self._loader

    @cached_property
    def examples(self) -> list[EncodedExample]:
        """The first 256 of the first lane, or fewer where its rows are; the same on all processes."""
        progress = LaneProgress([Cursor()] * len(self.sources))
        reader = LaneReader(*self._reader(0, self._lanes()[0], progress))
        few = islice(reader, 256)
        return [next(few), *takewhile(lambda _: not any(c.epoch for c in progress.cursors), few)]

    def state(self) -> dict[str, Any]:
        """Where all lanes stood when the last step ended, and of what stream. For all processes together.

        A run that is stopped within a step loses what it has of the gradient, so the step's batches come again.
        """
        self._settle()
        progress, done = self._at_step
        own = {lane: state for lane, state in progress.items() if self._is_own(lane)}
        every = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(every, own)
        found = {lane: state for progress in every for lane, state in progress.items()}
        self._at_step = found, done
        self._progress = found | {lane: state for lane, state in self._progress.items() if self._is_own(lane)}
        lanes = [[lane, found[lane]] for lane in sorted(found)]
        return {"order": self._order(), "num_lanes": self.num_lanes, "done": done, "lanes": lanes}

    def _order(self) -> dict[str, Any]:
        """What positions rest on."""
        hp = self.settings
        listed = {
            source.path: hashlib.sha256(json.dumps([(_base(s.name), s.size) for s in shards]).encode()).hexdigest()[:16]
            for source, shards in zip(self.sources, self.shards, strict=True)
        }
        return {"data.seed": hp["seed"], "data.buffer_size": hp["buffer_size"], "the list of files": listed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the run of a checkpoint stood.

        Raises:
            UserError: its positions would mean other rows, or its lanes cannot be shared out.
        """
        for name, now in self._order().items():
            before = state["order"][name]
            if now != before:
                raise UserError(
                    f"a stream goes on only in the order it was begun in, but {name} is {now}, where the run had "
                    f"{before}: give what it had, or begin another run."
                )
        self._begun_with, self._done = state["num_lanes"], state["done"]
        self._progress = dict(state["lanes"])
        self._at_step = dict(self._progress), self._done
        self.__dict__.pop("examples", None)
        assert self.num_lanes

    def progress_unit(self) -> dict[str, int]:
        """What a step is made of, on which the count of batches that are done rests."""
        number = self.trainer.accumulate_grad_batches
        return {
            "step_size": self.settings["batch_size"] * self.trainer.world_size * number,
            "micro_batches": number,
        }

    def first_batch(self) -> PreferenceBatch:
        """The batch that the first process's step 1 trains on."""
        return collate(self.examples[: self.settings["batch_size"]])

    def longest_batch(self) -> PreferenceBatch:
        return collate(sorted(self.examples, key=lambda e: e.num_tokens)[-self.settings["batch_size"] :])

    def describe(self) -> str:
        """What is streamed, and how it is shared out."""
        hp, total = self.settings, sum(self.sources.values())
        parts = [
            f"{source.path} (shards: {len(shards)}" + (f"; {weight / total:.1%})" if len(self.sources) > 1 else ")")
            for (source, weight), shards in zip(self.sources.items(), self.shards, strict=True)
        ]
        striped = ["rows" if parts[0].step > 1 else "shards" for parts in zip(*self._lanes(), strict=True)]
        return (
            f"{' and '.join(parts)}, streamed without end; {' and '.join(sorted(set(striped)))} dealt to "
            f"{self.num_lanes} lanes, shuffled within {hp['buffer_size']:,} rows; batches of {hp['batch_size']}"
        )

    def finish(self) -> None:
        """End the workers; say what became of the rows."""
        if self._loader:
            self._loader.close()
        if self.trainer.global_rank == 0 and (report := self.report()).rows:
            log.info("Of the stream: %s.", report.describe())

    def report(self) -> Report:
        """What became of the rows so far, as far as this process knows: all lanes at a checkpoint, then its own."""
        self._settle()
        reports = [LaneProgress.of(state).report for state in self._progress.values()]
        counts = {f.name: sum(getattr(r, f.name) for r in reports) for f in fields(Report) if f.name != "samples"}
        return Report(**counts)


def _base(name: str) -> str:
    """Of a file, its name, so that a data set may be moved."""
    return name.rsplit("/", 1)[-1]
