"""Intervals by the bootstrap over prompts and training seeds, paired between policies.

The replies to one prompt are alike, so what is drawn again is the prompt (a cluster), never a reply; with several
training runs of a policy these are drawn again too, crossed with the prompts, since all runs answer the same ones.
Policies that are compared see the same draws of prompts: what is hard for all of them then cancels.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value, the ends of its interval, and the number of prompts it rests on."""

    value: float
    low: float
    high: float
    num: int


class Resamples(NamedTuple):
    """Indices that were drawn with replacement."""

    prompts: NDArray[np.intp]  # [draws, prompts]
    seeds: NDArray[np.intp]  # [draws, seeds]


def resamples(num_prompts: int, num_seeds: int = 1, draws: int = DRAWS, seed: int = 0) -> Resamples:
    """Draw prompts and training seeds; the same `seed` gives the same prompts whatever the number of training seeds."""
    prompts = np.random.default_rng((seed, 0)).integers(num_prompts, size=(draws, num_prompts))
    seeds = np.random.default_rng((seed, 1)).integers(num_seeds, size=(draws, num_seeds))
    return Resamples(prompts, seeds)


def draws_of(values: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Array:
    """The mean of values [prompts] or [seeds, prompts] in every draw -> [draws]; values that are nan are left out.

    Values [seeds, prompts, k] give [draws, k], the same draws for each of the k. Arrays of several policies, with the
    same prompts in the same order, get the same draws of prompts: differences between the results are paired.
    """
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    found, counted = np.nan_to_num(matrix), np.isfinite(matrix).astype(np.float64)
    drawn = resamples(matrix.shape[1], matrix.shape[0], draws, seed)
    # How often each prompt and each seed was drawn turns the mean over a draw into a product of matrices.
    prompts, seeds = _counts(drawn.prompts, matrix.shape[1]), _counts(drawn.seeds, matrix.shape[0])
    sums = np.einsum("ds,sp...,dp->d...", seeds, found, prompts, optimize=True)
    numbers = np.einsum("ds,sp...,dp->d...", seeds, counted, prompts, optimize=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / numbers)


def _counts(indices: NDArray[np.intp], size: int) -> Array:
    """How often each of `size` indices stands in each row of indices [draws, n] -> [draws, size]."""
    rows = np.arange(len(indices))[:, None] * size
    return np.bincount((indices + rows).ravel(), minlength=len(indices) * size).reshape(-1, size).astype(np.float64)


def bootstrap(values: ArrayLike, draws: int = DRAWS, seed: int = 0, level: float = LEVEL) -> Interval:
    """The mean of values [prompts] or [seeds, prompts], with its percentile interval; nan without a value."""
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    known = np.isfinite(matrix)
    if not known.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return interval(float(matrix[known].mean()), draws_of(matrix, draws, seed), int(known.any(0).sum()), level)


def interval(value: float, drawn: ArrayLike, num: int, level: float = LEVEL) -> Interval:
    """A value with the percentile interval of its bootstrap draws; one prompt, the same in all of them, has none."""
    kept = np.asarray(drawn, dtype=np.float64)
    kept = kept[np.isfinite(kept)]
    if num < 2 or not len(kept):
        return Interval(value, float("nan"), float("nan"), num)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), num)


def paired_difference(a: ArrayLike, b: ArrayLike, draws: int = DRAWS, seed: int = 0, level: float = LEVEL) -> Interval:
    """mean(a) - mean(b) of values [prompts] or [seeds, prompts] of two policies over the same prompts.

    Raises:
        ValueError: the numbers of prompts differ.
    """
    first, second = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (a, b))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"expected values of the same prompts, but got {first.shape[1]} and {second.shape[1]}")
    # A prompt that one of the two has no value for tells nothing of their difference.
    known = np.isfinite(first).any(0) & np.isfinite(second).any(0)
    first, second = first[:, known], second[:, known]
    if not known.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    drawn = draws_of(first, draws, seed) - draws_of(second, draws, seed)
    return interval(float(np.nanmean(first) - np.nanmean(second)), drawn, int(known.sum()), level)
