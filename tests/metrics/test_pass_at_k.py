"""Each measure against the mean over all subsets, enumerated."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy.special import comb

from spl.metrics.pass_at_k import chosen_at_k, distinct_at_k, majority_at_k, missing, pass_at_k

ANSWERS = [
    ["a", "a", "b", "c", None, "b", "a", "d"],
    ["b", "b", "a", "a", "c", "c", None],
    ["a", None, None, "b", "b", "b"],
    ["a"] * 5,
    ["b", "c", "b"],
    [None, None],
]


def enumerated(values: Sequence[object], measure: Callable[[list[object]], float], max_k: int) -> list[float]:
    """The mean of a measure over all subsets of 1 .. max_k of the values, nan above their number."""
    means = []
    for k in range(1, max_k + 1):
        found = [measure(list(subset)) for subset in combinations(values, k)]
        means.append(float(np.mean(found)) if found else float("nan"))
    return means


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_reply() -> None:
    for num, correct in [(1, 0), (1, 1), (6, 0), (6, 2), (6, 5), (6, 6)]:
        replies = [k < correct for k in range(num)]
        np.testing.assert_allclose(
            pass_at_k(num, correct, 8), enumerated(replies, lambda s: float(any(s)), 8), atol=1e-14
        )


@pytest.mark.parametrize(("num", "correct"), [(128, 0), (128, 1), (128, 63), (200, 7), (1000, 3), (1000, 900)])
def test_pass_at_k_is_the_papers_formula(num: int, correct: int) -> None:
    k = np.arange(1, 129)
    expected = 1 - comb(num - correct, k) / comb(num, k)
    np.testing.assert_allclose(pass_at_k(num, correct, 128), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(missing(num, correct, 128), 1 - expected, rtol=1e-9, atol=1e-12)


def test_pass_at_k_holds_where_binomials_overflow() -> None:
    # Of 10,000 replies one is correct: it is among k of them with chance k / 10,000.
    np.testing.assert_allclose(pass_at_k(10_000, 1, 5_000), np.arange(1, 5_001) / 10_000, rtol=1e-9)


@pytest.mark.parametrize("answers", ANSWERS)
def test_distinct_at_k_is_the_mean_number_of_classes(answers: list[str | None]) -> None:
    np.testing.assert_allclose(
        distinct_at_k(answers, 9), enumerated(answers, lambda s: len(set(s) - {None}), 9), atol=1e-12
    )


def test_the_best_scored_reply_of_k() -> None:
    scores = [0.5, -1.0, 2.0, 0.5, 2.0, 0.1, -1.0]
    correct = [True, True, False, False, True, False, True]

    def best(subset: list[object]) -> float:
        top = max(scores[k] for k in subset)
        return float(np.mean([correct[k] for k in subset if scores[k] == top]))

    np.testing.assert_allclose(chosen_at_k(scores, correct, 8), enumerated(range(7), best, 8), atol=1e-12)
    assert np.isnan(chosen_at_k([], [], 2)).all()


@pytest.mark.parametrize("answers", ANSWERS)
def test_majority_at_k_with_ties_at_random(answers: list[str | None]) -> None:
    def right(subset: list[object]) -> float:
        votes = Counter(answer for answer in subset if answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        return ("a" in top) / len(top) if top else 0.0

    np.testing.assert_allclose(majority_at_k(answers, "a", 9), enumerated(answers, right, 9), atol=1e-12)


def test_majority_at_k_of_many_replies() -> None:
    # All that is drawn votes: with 70 of 128 for the right answer and one other, the full vote is won, and so on.
    votes = ["a"] * 70 + ["b"] * 58
    found = majority_at_k(votes, "a", 128)
    assert found[127] == 1.0 and found[0] == pytest.approx(70 / 128)
    k, v = 65, np.arange(66)  # an odd number has no ties: a hypergeometric tail
    law = comb(70, v) * comb(58, k - v) / comb(128, k)
    assert found[64] == pytest.approx(law[v > k / 2].sum(), rel=1e-9)
    spread = majority_at_k(["a", "a", *(f"x{k}" for k in range(126))], "a", 128)
    # Both of the right replies are drawn, or they are one of k answers that tie.
    both = 64 * 63 / (128 * 127)
    one = 2 * 64 / 128 - 2 * both
    assert spread[63] == pytest.approx(both + one / 64, rel=1e-9)


def test_majority_at_k_says_nothing_where_numbers_end() -> None:
    found = majority_at_k(["a", "b"] * 600, "a", 400)
    assert np.isfinite(found[:100]).all() and np.isnan(found[-1])
