"""The order of a stream: what each of its lanes reads is a pure function of the seed and a position.

A stream is cut into lanes, as many as there are processes times workers unless more are asked for. Each lane owns its
rows: whole shards where they can be dealt out evenly, or else every n-th row of all. It goes through them pass after
pass, never running dry, and so no process ever waits for one that has: shards in an order of the pass, rows shuffled
within windows. Where it stands is four numbers, from which it goes on without a look at what was done before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from spl.data.budget import partition
from spl.data.shards import Retries, Row, Shard, read
from spl.types import UserError

_EVEN = 1.1
"""Largest lane over smallest where whole shards are dealt out: it passes over its rows so much more rarely."""


class Cursor(NamedTuple):
    """Where a lane stands in a source."""

    epoch: int = 0  # passes that are done
    shard: int = 0  # where the window begins: of the lane's shards, in the order of the pass
    row: int = 0  # and of that shard's rows
    taken: int = 0  # rows of the window that are done, in its shuffled order


@dataclass(frozen=True)
class Lane:
    """A lane of one source.

    Attributes:
        shards: what it reads.
        firsts: of each shard, the first row that is the lane's.
        step: from there on, every step-th row is.
        seed: of its order.
        buffer_size: rows of a window, which are in memory together.
    """

    shards: tuple[Shard, ...]
    firsts: tuple[int, ...]
    step: int
    seed: tuple[int, ...]
    buffer_size: int
    retries: Retries

    def rows(self, cursor: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """Rows from a place on, without end, each with where the lane stands after it.

        Raises:
            UserError: a shard cannot be read, or the lane has no row at all.
        """
        epoch, place, taken = cursor.epoch, cursor[1:3], cursor.taken
        while True:
            rows = self._pass(epoch, *place)
            while window := list(islice(rows, self.buffer_size)):
                order = np.random.default_rng([*self.seed, epoch, *place]).permutation(len(window)).tolist()
                after = window[-1].after
                for done, k in enumerate(order[taken:], taken + 1):
                    row, window[k] = window[k], _TAKEN  # which makes room
                    yield row.shard.row(row.number, row.raw), Cursor(epoch, *place, done)
                place, taken = after, 0
            if place == (0, 0):
                if self.step == 1:
                    raise UserError(f"{self.shards[0].name}: no row in it to train on.")
                raise UserError(
                    f"{self.shards[0].name}: fewer rows than the {self.step} lanes that read them: lower "
                    "data.num_workers, data.lanes or trainer.devices."
                )
            epoch, place, taken = epoch + 1, (0, 0), 0

    def _pass(self, epoch: int, begin: int, row: int) -> Iterator["_Unread"]:
        """What is left of a pass, unshuffled."""
        order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.shards)).tolist()
        for position, index in enumerate(order[begin:], begin):
            shard, start = self.shards[index], row + (self.firsts[index] - row) % self.step
            for number, raw in read(shard, start, self.step, self.retries):
                yield _Unread((position, number + 1), shard, number, raw)
            row = 0


class _Unread(NamedTuple):
    """A row of a window."""

    after: tuple[int, int]  # the place after it: shard in the order of the pass, row
    shard: Any
    number: int
    raw: Any


_TAKEN = _Unread((0, 0), None, 0, None)


def deal(
    shards: Sequence[Shard], num_lanes: int, seed: tuple[int, ...], buffer_size: int, retries: Retries
) -> list[Lane]:
    """The lanes of a source: whole shards where none would be much smaller than another, or else every n-th row."""
    if len(shards) >= num_lanes:
        sizes = [shard.size for shard in shards]
        groups = partition(sizes, num_lanes)
        loads = [sum(sizes[k] for k in group) for group in groups]
        if max(loads) <= _EVEN * min(loads):
            return [
                Lane(tuple(shards[k] for k in group), (0,) * len(group), 1, (*seed, lane), buffer_size, retries)
                for lane, group in enumerate(groups)
            ]
    # Shards begin with different lanes, so that many short ones do not all give their only row to the same.
    return [
        Lane(
            tuple(shards),
            tuple((lane + k) % num_lanes for k in range(len(shards))),
            num_lanes,
            (*seed, lane),
            buffer_size,
            retries,
        )
        for lane in range(num_lanes)
    ]
