"""Which source a lane's next example comes from, where several are mixed."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

_ONE = 2**64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, made odd


class Mixture:
    """The source of each of a lane's examples: a pure function of the seed and the example's number.

    The multiples of the golden ratio, modulo 1, are spread more evenly than random numbers are: a source gives its
    share of any n consecutive examples to within a few (Weyl's sequence, whose discrepancy is of order log n / n).

    Args:
        weights: of the sources, above 0.
        seed: of the lane.
    """

    def __init__(self, weights: Sequence[float], seed: Sequence[int]) -> None:
        self._offset = int(np.random.default_rng(seed).integers(_ONE, dtype=np.uint64))
        sums = list(accumulate(map(Fraction, weights)))
        self._bounds = [int(_ONE * bound / sums[-1]) for bound in sums]

    def __call__(self, number: int) -> int:
        at = (self._offset + number * _GOLDEN) % _ONE
        return next(k for k, bound in enumerate(self._bounds) if at < bound)
