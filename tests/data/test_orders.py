"""Orders of options: each option in each place equally often, by counting."""

from collections import Counter
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.orders import orders_of


@given(st.integers(2, 12), st.integers(2, 60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_option_stands_in_each_place_equally_often(count: int, most: int, seed: int) -> None:
    orders = orders_of(count, most, (seed,))
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert set(Counter(order[place] for order in orders).values()) == {len(orders) // count}
    assert len(orders) == min(factorial(count), max(most // count, 1) * count)


@pytest.mark.parametrize("count", [2, 5, 30])
def test_one_order_is_the_listed_one(count: int) -> None:
    assert orders_of(count, 1, (0,)) == [tuple(range(count))]


def test_all_orders_where_there_are_few() -> None:
    assert len(set(orders_of(3, 6, (0,)))) == 6
    assert len(set(orders_of(4, 24, (0,)))) == 24


def test_random_orders_are_the_seed_s() -> None:
    assert orders_of(5, 10, (1, 2)) == orders_of(5, 10, (1, 2))
    assert orders_of(5, 10, (1, 2)) != orders_of(5, 10, (1, 3))
