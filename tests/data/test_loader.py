"""The order of batches, against its definition."""

from itertools import chain

from hypothesis import assume, given
from hypothesis import strategies as st

from spl.data.loader import InOrder, Shuffled

SIZES = st.integers(1, 200)


@given(SIZES, st.integers(1, 8), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_ranks_share_an_epoch_without_overlap(n: int, size: int, world: int, seed: int, epoch: int) -> None:
    ranks = [Shuffled(n, size, seed, rank, world)(epoch) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch]
    assert all(len(batch) == size for batches in ranks for batch in batches)
    assert len(seen) == len(set(seen)) == n // (size * world) * size * world
    assert set(seen) <= set(range(n))


@given(SIZES, st.integers(1, 8), st.integers(1, 4))
def test_an_optimiser_step_sees_the_same_examples_on_any_number_of_processes(n: int, size: int, world: int) -> None:
    one = Shuffled(n, size * world, 1)(2)
    ranks = [Shuffled(n, size, 1, rank, world)(2) for rank in range(world)]
    assert one == [list(chain.from_iterable(round_)) for round_ in zip(*ranks, strict=True)]


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(Shuffled(50, 50, seed)(epoch)[0]) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@given(SIZES, st.integers(1, 8), st.integers(1, 4))
def test_an_evaluation_sees_every_example_once(n: int, size: int, world: int) -> None:
    assume(n >= world)
    ranks = [InOrder(n, size, rank, world)(0) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(n))
    assert all(1 <= len(batch) <= max(size, 2) for batches in ranks for batch in batches)


def test_one_process_evaluates_in_order() -> None:
    assert list(chain.from_iterable(InOrder(10, 4)(0))) == list(range(10))
