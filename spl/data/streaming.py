"""Batches of a stream: each comes from one lane, and tells where that lane stands after its last example.

Batch number k of a run, over all processes, is the next one of lane k modulo the number of lanes. The main process
keeps the notes of batches that were trained on, not of those that workers have ready; a checkpoint holds all lanes'.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from spl.data.collate import EncodedExample, collate
from spl.data.encode import TOGETHER, Encoded, Report, RowEncoder
from spl.data.lanes import Cursor, Lane
from spl.data.loader import sent
from spl.data.mixture import Mixture
from spl.data.shards import Row
from spl.types import PreferenceBatch, UserError


@dataclass
class LaneProgress:
    """Where a lane stands in each source, and what became of the rows it read."""

    cursors: list[Cursor]
    report: Report = field(default_factory=Report)

    def state(self) -> dict[str, Any]:
        """Plain numbers, without samples of bad rows."""
        return {"cursors": [list(c) for c in self.cursors], "report": asdict(self.report) | {"samples": []}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "LaneProgress":
        return cls([Cursor(*c) for c in state["cursors"]], Report(**state["report"]))


class Note(NamedTuple):
    """What a batch's lane says with it."""

    lane: int
    state: dict[str, Any]
    samples: list[dict[str, str]]  # bad rows since its last batch


class LaneReader:
    """The examples of one lane, without end.

    Args:
        sources: the lane of each source.
        weights: of the sources.
        seed: of the lane.
        encoder: tokenises rows.
        progress: where it begins; kept up to date with each example.
    """

    def __init__(
        self,
        sources: Sequence[Lane],
        weights: Sequence[float],
        seed: Sequence[int],
        encoder: RowEncoder,
        progress: LaneProgress,
    ) -> None:
        self.encoder = encoder
        self.progress = progress
        self._names = [lane.shards[0].name for lane in sources]
        self._mixture = Mixture(weights, seed)
        self._rows = [self._encoded(lane, cursor) for lane, cursor in zip(sources, progress.cursors, strict=True)]
        # The pass in which each source had its last usable row; that of a new one is the one before the first.
        self._fruitful = [c.epoch if c > Cursor() else -1 for c in progress.cursors]

    def __iter__(self) -> Iterator[EncodedExample]:
        return self

    def __next__(self) -> EncodedExample:
        """The next usable row of the source whose turn it is.

        Raises:
            UserError: as `RowEncoder.count`, a shard cannot be read, or a whole pass over a source had no usable row.
        """
        report = self.progress.report
        source = self._mixture(report.examples)
        for row, outcome, cursor in self._rows[source]:
            self.progress.cursors[source] = cursor
            if found := self.encoder.count(row, outcome, report):
                self._fruitful[source] = cursor.epoch
                return found.tokens
            if cursor.epoch > self._fruitful[source] + 1:
                break
        first = f" (first: {report.samples[0]['reason']})" if report.samples else ""
        raise UserError(f"{self._names[source]}: no usable example among its rows{first}.")

    def _encoded(self, lane: Lane, cursor: Cursor) -> Iterator[tuple[Row, Encoded | UserError, Cursor]]:
        rows = lane.rows(cursor)
        while together := list(islice(rows, TOGETHER)):
            outcomes = self.encoder.encode([row for row, _ in together])
            for (row, after), outcome in zip(together, outcomes, strict=True):
                yield row, outcome, after


class StreamBatches(IterableDataset[Any]):
    """The batches of one process's lanes, as its workers make them: (batch, Note), or the UserError that ends them.

    Args:
        readers: arguments of each lane's LaneReader.
        num_lanes: of all processes.
        batch_size: examples.
        done: batches of all processes that are done.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self, readers: dict[int, tuple[Any, ...]], num_lanes: int, batch_size: int, done: int, rank: int, world: int
    ) -> None:
        self.readers = readers
        self.num_lanes = num_lanes
        self.batch_size = batch_size
        self.done = done
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[tuple[PreferenceBatch, Note] | UserError]:
        worker = get_worker_info()
        first, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number, readers = self.done + first * self.world + self.rank, dict[int, LaneReader]()
        try:
            while True:
                lane = number % self.num_lanes
                if lane not in readers:
                    readers[lane] = LaneReader(*self.readers[lane])
                yield self._batch(lane, readers[lane])
                number += workers * self.world
        except UserError as error:
            yield error  # raised in a worker it would come wrapped in a page of traceback

    def _batch(self, lane: int, reader: LaneReader) -> tuple[PreferenceBatch, Note]:
        report = reader.progress.report
        known = len(report.samples)
        examples = list(islice(reader, self.batch_size))
        return sent(collate(examples)), Note(lane, reader.progress.state(), report.samples[known:])
