"""The order of a stream, against its definition: every row once a pass, and from any place on what would have come."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.lanes import Cursor, Lane, deal
from spl.data.mixture import Mixture
from spl.data.shards import Retries, Row, read
from spl.types import UserError

NOW = Retries(number=3, wait=0)
BEGIN = Cursor()


@dataclass(frozen=True)
class Numbers:
    """A shard of the rows 0 to length - 1.

    Attributes:
        size: what it says of itself.
        failures: rows at which reading fails, and how many times more.
        log: numbers of the rows that were read.
    """

    name: str
    length: int
    size: int = 1
    failures: dict[int, int] = field(default_factory=dict)
    log: list[int] = field(default_factory=list)
    faults: ClassVar[tuple[type[Exception], ...]] = (OSError, EOFError)

    def may_pass(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def where(self, number: int) -> str:
        return f"{self.name}, row {number + 1}"

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        for number in range(start, self.length, step):
            if self.failures.get(number):
                self.failures[number] -= 1
                raise OSError("the server does not answer")
            self.log.append(number)
            yield number, number

    def row(self, number: int, raw: Any) -> Row:
        return Row(self.where(number), {"n": raw})


def shards(*lengths: int) -> list[Numbers]:
    return [Numbers(f"shard {k}", length, size=length) for k, length in enumerate(lengths)]


def everything(found: list[Numbers]) -> list[str]:
    return sorted(shard.where(n) for shard in found for n in range(shard.length))


def first_pass(lane: Lane, begin: Cursor = BEGIN) -> list[tuple[str, Cursor]]:
    found = []
    for row, cursor in lane.rows(begin):
        if cursor.epoch > begin.epoch:
            break
        found.append((row.where, cursor))
    return found


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=60)
def test_lanes_share_a_pass_without_overlap(lengths: list[int], num_lanes: int, buffer: int, seed: int) -> None:
    found = shards(*lengths)
    lanes = deal(found, num_lanes, (seed,), buffer, NOW)
    assert len(lanes) == num_lanes
    seen = []
    for lane in lanes:
        try:
            seen += [where for where, _ in first_pass(lane)]
        except UserError as error:
            assert "fewer rows than" in str(error) or "no row in it" in str(error)
    assert sorted(seen) == everything(found)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 12), st.data())
@settings(max_examples=40)
def test_a_lane_goes_on_from_any_place(lengths: list[int], num_lanes: int, buffer: int, data: Any) -> None:
    lane = data.draw(st.sampled_from(deal(shards(*lengths, 3, 5), num_lanes, (1,), buffer, NOW)))
    rows = [(row.where, cursor) for row, cursor in islice(lane.rows(Cursor()), 100)]  # several passes of most
    at = data.draw(st.integers(0, 79))
    rest = [(row.where, cursor) for row, cursor in islice(lane.rows(rows[at][1]), 20)]
    assert rest == rows[at + 1 : at + 21]


def test_passes_and_seeds_differ_and_each_has_every_row() -> None:
    orders = []
    for seed in (0, 1):
        (lane,) = deal(shards(20, 20), 1, (seed,), 10, NOW)
        rows = [row.where for row, _ in islice(lane.rows(Cursor()), 120)]
        orders += [tuple(rows[k : k + 40]) for k in (0, 40, 80)]
    assert len(set(orders)) == 6
    assert {tuple(sorted(order)) for order in orders} == {tuple(everything(shards(20, 20)))}


@pytest.mark.parametrize(
    ("lengths", "num_lanes", "whole"),
    [((10, 10, 10, 10), 2, True), ((30, 10, 10, 10), 2, True), ((10, 10, 10), 2, False), ((5,), 2, False)],
)
def test_whole_shards_are_dealt_where_that_is_even(lengths: tuple[int, ...], num_lanes: int, whole: bool) -> None:
    lanes = deal(shards(*lengths), num_lanes, (0,), 4, NOW)
    assert {lane.step for lane in lanes} == {1 if whole else num_lanes}
    counts = [len(first_pass(lane)) for lane in lanes]
    assert max(counts) - min(counts) <= 1


def test_short_shards_give_their_rows_to_different_lanes() -> None:
    lanes = deal(shards(*[1] * 30), 4, (0,), 4, NOW)
    assert sorted(len(first_pass(lane)) for lane in lanes) == [7, 7, 8, 8]


@pytest.mark.parametrize("taken", [0, 1, 10, 55])
def test_no_more_than_a_window_is_read_ahead(taken: int) -> None:
    (shard,) = found = shards(1_000)
    (lane,) = deal(found, 1, (0,), 10, NOW)
    list(islice(lane.rows(Cursor()), taken))
    assert len(shard.log) == -(-taken // 10) * 10


def test_seeking_reads_from_the_window_on() -> None:
    (shard,) = found = shards(1_000)
    (lane,) = deal(found, 1, (0,), 10, NOW)
    *_, (_, cursor) = islice(lane.rows(Cursor()), 555)
    shard.log.clear()
    next(lane.rows(cursor))
    assert shard.log == list(range(550, 560))


@given(st.dictionaries(st.integers(0, 19), st.integers(1, 3), max_size=5), st.integers(1, 3))
def test_faults_that_pass_lose_and_repeat_no_row(failures: dict[int, int], step: int) -> None:
    shard = Numbers("a", 20, failures=dict(failures))
    assert [number for number, _ in read(shard, 0, step, NOW)] == list(range(0, 20, step))


def test_a_fault_that_stays_is_named_with_its_row_and_the_tries(caplog: pytest.LogCaptureFixture) -> None:
    shard = Numbers("a", 20, failures={7: 4})
    with pytest.raises(UserError, match=r"^a cannot be read from row 8 on: the server does not answer, 3 times tried"):
        list(read(shard, 0, 1, NOW))
    assert shard.log == list(range(7))
    assert caplog.text.count("a, row 8: the server does not answer; trying again") == 3


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_a_mixture_has_its_shares_everywhere(weights: list[float], seed: int) -> None:
    picks, size = [Mixture(weights, (seed, 3))(number) for number in range(2_000)], 500
    for source, weight in enumerate(weights):
        for begin in (0, 700, 1_500):
            count = picks[begin : begin + size].count(source)
            # A random draw would be off by some 11 at a share of a half.
            assert abs(count - size * weight / sum(weights)) <= 4


def test_lanes_mix_in_different_orders() -> None:
    assert len({tuple(Mixture([1, 1], (0, lane))(n) for n in range(30)) for lane in range(8)}) > 4
