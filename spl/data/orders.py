"""In which orders the options of a question are shown: a model prefers some places, and averaging takes that out."""

from collections.abc import Sequence
from itertools import permutations
from math import factorial

import numpy as np


def orders_of(count: int, most: int, seed: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders of `count` options, each option in each place equally often; order[k] is the option in place k.

    All orders where there are at most `most`; else the turns of as many random orders as make up `most`, but of one at
    least, so that there may be as many orders as options where `most` is less.

    Args:
        count: of options.
        most: orders; 1 is the order in which the options are listed.
        seed: of the random orders.
    """
    if most <= 1:
        return [tuple(range(count))]
    if count < 8 and factorial(count) <= most:
        return list(permutations(range(count)))
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(count).tolist() for _ in range(max(1, most // count))]
    return [tuple(order[turn:] + order[:turn]) for order in drawn for turn in range(count)]
