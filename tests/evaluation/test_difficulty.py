"""Problems are sorted by how many samples they take to solve; by other samples than those that are evaluated."""

from itertools import permutations

import numpy as np
import pytest

from spl.data.problems import Problem
from spl.evaluation.difficulty import check_thresholds, difficulty_groups, level_groups, ordered, samples_to_solve
from spl.metrics.pass_at_k import pass_at_k
from spl.types import UserError


def test_samples_to_solve_is_the_mean_place_of_the_first_correct_one() -> None:
    for num, correct in [(6, 1), (6, 2), (6, 4), (5, 5)]:
        replies = [True] * correct + [False] * (num - correct)
        places = [order.index(True) + 1 for order in permutations(replies)]
        assert samples_to_solve(num, correct) == pytest.approx(np.mean(places))


def test_groups_are_the_papers() -> None:
    # 129 / (c + 1): 4 or less from c = 32 on, 64 or less from c = 2 on.
    counts = {"a": 128, "b": 32, "c": 31, "d": 2, "e": 1, "f": 0}
    graded = {item: [k < count for k in range(128)] for item, count in counts.items()}
    groups = difficulty_groups(graded, 4, 64)
    assert groups == {"a": "easy", "b": "easy", "c": "medium", "d": "medium", "e": "hard", "f": "hard"}
    assert ordered(groups) == ["easy", "medium", "hard"]


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(UserError, match="rests on 16 of each: draw more"):
        difficulty_groups({"a": [False] * 16}, 4, 64)
    assert difficulty_groups({"a": [False] * 16}, 2, 8) == {"a": "hard"}
    with pytest.raises(UserError, match="must be above"):
        check_thresholds(8, 8)


def test_levels_of_the_source() -> None:
    problems = [Problem("a", "?", "?", "1", "5"), Problem("b", "?", "?", "1", "1"), Problem("c", "?", "?", "1")]
    groups = level_groups(problems)
    assert groups == {"a": "level 5", "b": "level 1"} and ordered(groups) == ["level 1", "level 5"]
    with pytest.raises(UserError, match="no column level"):
        level_groups(problems[2:])


def test_separate_samples_are_unbiased_and_the_same_ones_are_not() -> None:
    """Simulated: the truth for a group is the mean of 1 - (1 - p)^k over the problems that are in it."""
    draw = np.random.default_rng(0)
    num, k = 128, 16
    solved = draw.beta(0.3, 6, size=4000)  # the chance that a sample solves each problem
    evaluated, apart = (draw.random((4000, num)) < solved[:, None] for _ in range(2))
    estimates = np.array([pass_at_k(num, int(row.sum()), k)[-1] for row in evaluated])
    truth = 1 - (1 - solved) ** k
    gaps = {}
    for name, sorter in (("separate", apart), ("paper", evaluated)):
        groups = difficulty_groups({str(i): row.tolist() for i, row in enumerate(sorter)}, 4, 64)
        hard = np.array([groups[str(i)] == "hard" for i in range(4000)])
        error = (estimates - truth)[hard]
        gaps[name] = error.mean() / (error.std() / hard.sum() ** 0.5)  # in standard errors
    assert abs(gaps["separate"]) < 3
    assert gaps["paper"] < -10
