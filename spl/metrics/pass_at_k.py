"""What k of the n replies to a problem are worth: unbiased for every k, exact over all subsets.

Each function looks at the n replies to one problem and answers for k = 1 .. max_k at once: the mean over all subsets of
k replies. Above n there are no such subsets, and the value is nan. All but the vote rest on `missing`, the chance that
a subset has none of some replies.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def missing(num: int, some: int, max_k: int) -> Array:
    """C(n-m, k) / C(n, k) for k = 1 .. max_k: the share of the subsets of k of n replies that have none of some m.

    As the product over j < k of (n-m-j) / (n-j), whose factors lie in [0, 1], where the binomials would overflow.
    """
    j = np.arange(max_k)
    left = np.maximum(num - j, 0)
    with np.errstate(invalid="ignore"):
        return np.cumprod(np.maximum(left - some, 0) / np.where(left, left, np.nan))


def pass_at_k(num: int, correct: int, max_k: int) -> Array:
    """Chance that one of k replies at least is correct, [max_k]; Chen et al., arXiv 2107.03374, equation 1."""
    return 1.0 - missing(num, correct, max_k)


def distinct_at_k(classes: Sequence[Hashable | None], max_k: int) -> Array:
    """Expected number of distinct classes among k replies, [max_k]: rarefaction (Hurlbert 1971).

    None is a reply that is of no class.
    """
    sizes = Counter(label for label in classes if label is not None)
    counts = Counter(sizes.values())  # classes of one size are alike
    total = 0.0 * missing(len(classes), 0, max_k)  # nan above their number
    for size, number in counts.items():
        total += number * (1.0 - missing(len(classes), size, max_k))
    return total


def chosen_at_k(scores: Sequence[float], correct: Sequence[bool], max_k: int) -> Array:
    """Chance that the best-scored of k replies is correct, [max_k]; among equal scores one is chosen at random.

    The replies by their scores, best first: number i (from 0) is the best of a subset that has none of those before it
    and itself, which is the difference of two `missing`.
    """
    num = len(scores)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    ranked, right = np.asarray(scores)[order], np.asarray(correct, dtype=np.float64)[order]
    total = 0.0 * missing(num, 0, max_k)  # nan above their number
    for start, stop in _runs(ranked):
        total += right[start:stop].mean() * (missing(num, start, max_k) - missing(num, stop, max_k))
    return total


def _runs(ranked: NDArray[np.float64]) -> list[tuple[int, int]]:
    """First and past-last index of each run of equal scores."""
    ends = [*(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1).tolist(), len(ranked)]
    return list(zip([0, *ends[:-1]], ends, strict=True)) if len(ranked) else []


def majority_at_k(votes: Sequence[Hashable | None], right: Hashable, max_k: int) -> Array:
    """Chance that the answer with the most of k votes is the right one, [max_k]; ties are broken at random.

    Exact, by generating functions: for each number v of votes for the right answer, the subsets in which no other
    answer has more, by their size and by how many tie with it. None is a reply without an answer, which has no vote; k
    replies without any choose nothing right.

    Where C(n, k) is beyond float64 (n = 2000 at k = 200, say) the value is nan.
    """
    counts = Counter(votes)
    abstained, votes_right = counts.pop(None, 0), counts.pop(right, 0)
    size = min(max_k, len(votes))
    total = np.zeros(size + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        for v in range(1, min(votes_right, size) + 1):
            ways = _ways(list(counts.values()), abstained, v, size - v)  # [ties, other replies]
            won = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(0)
            total[v:] += _binomial(votes_right, v) * won
        subsets = np.array([_binomial(len(votes), k) for k in range(1, size + 1)])
        found = total[1:] / subsets
    return np.concatenate([np.where(np.isfinite(subsets), found, np.nan), np.full(max_k - size, np.nan)])


def _ways(others: list[int], abstained: int, v: int, size: int) -> Array:
    """Subsets of the other replies where no answer has more than v votes, by ties at v and size, [ties+1, size+1]."""
    ways = np.zeros((1 + sum(count >= v for count in others), size + 1))
    for u in range(min(abstained, size) + 1):
        ways[0, u] = _binomial(abstained, u)
    for count in others:
        before, ways = ways, ways.copy()
        for u in range(1, min(count, v - 1, size) + 1):
            ways[:, u:] += _binomial(count, u) * before[:, : size + 1 - u]
        if v <= min(count, size):
            ways[1:, v:] += _binomial(count, v) * before[:-1, : size + 1 - v]
    return ways


def _binomial(n: int, k: int) -> float:
    try:
        return float(comb(n, k))
    except OverflowError:
        return float("inf")
