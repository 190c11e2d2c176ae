"""Numbers over problems and training runs against obvious loops, on replies made by hand."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import Answer, reply, serving

from spl.evaluation.approaches import approaches, by_judge, linked
from spl.evaluation.grading import Graded, Solution
from spl.evaluation.judge import Judge
from spl.evaluation.sample_files import Reply
from spl.evaluation.solved import Bootstrap, drawn_at, first_reached, item_records, measured, told
from spl.intervals import paired_difference, resamples
from spl.metrics.pass_at_k import pass_at_k
from spl.sampling.server import ChatServer

RANDOM = np.random.default_rng(3)


def solution(answer: int | None, text: str = "", tokens: int = 5, finish: str = "stop") -> Solution:
    return Solution(Reply(text, tokens, finish, None), answer)


def graded(policy: str, correct: list[list[int]], num: int = 16) -> Graded:
    """Replies of which so many are correct, by training run and problem; wrong ones are wrong in their own ways."""
    solutions = [[[solution(0 if k < c else k + 1) for k in range(num)] for c in run] for run in correct]
    return Graded(policy, "t 1", list(range(len(correct))), solutions)


def test_measures_of_one_problem() -> None:
    replies = [solution(0, tokens=10), solution(0), solution(1), solution(None, tokens=20, finish="length")]
    found = measured(Graded("dpo", "t 1", [None], [[replies]]), 2, [[[0.0, 1.0, 2.0, -1.0]]])
    values = {name: matrix[0, 0] for name, matrix in found.values.items()}
    # Pairs: 00 01 0- 01 0- 1-; the best-rewarded of the replies is the wrong one, then the second.
    assert values["pass@1"] == 2 / 4 and values["pass@2"] == pytest.approx(5 / 6)
    assert values["majority@2"] == pytest.approx((1 + 0.5 + 1 + 0.5 + 1 + 0) / 6)
    assert values["reward_chosen@2"] == pytest.approx((1 + 0 + 1 + 0 + 1 + 0) / 6)
    assert values["distinct@2"] == pytest.approx((1 + 2 + 1 + 2 + 1 + 1) / 6)
    # A pair has 1.5 answers on average, of which 8/6 are the first of their kind.
    assert values["repeats"] == pytest.approx(1 - (8 / 6) / 1.5)
    assert (values["unread"], values["length"], values["truncation_rate"]) == (0.25, 10.0, 0.25)


def test_replies_that_nobody_counted_the_tokens_of() -> None:
    """As a server gives them; the mean length is of those that are known."""
    unknown = Solution(Reply("", None, "stop", None), 0)
    replies = [[solution(0, tokens=7), unknown], [unknown, unknown]]
    np.testing.assert_array_equal(measured(Graded("dpo", "t 1", [None], [replies]), 2).values["length"], [[7, np.nan]])


def test_k_that_are_told_and_drawn() -> None:
    assert told(128) == [1, 4, 16, 64, 128] and told(16) == [1, 4, 16] and told(1) == [1]
    assert drawn_at(16) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16]
    assert drawn_at(128)[-1] == 128 and drawn_at(100)[-1] == 100


def test_bands_and_differences_rest_on_the_same_draws() -> None:
    ours, theirs = RANDOM.integers(0, 17, (3, 20)), RANDOM.integers(0, 9, (2, 20))
    a, b = (measured(graded(name, counts.tolist()), 16) for name, counts in (("spl", ours), ("dpo", theirs)))
    bootstrap = Bootstrap(draws=200, seed=4)
    chosen = list(range(5, 20))
    curve = next(r for r in bootstrap.curve_records(a, "hard", chosen) if r["name"] == "pass@k")
    table = np.array([[pass_at_k(16, c, 16) for c in run] for run in ours.tolist()])[:, 5:]
    drawn = resamples(15, 3, 200, 4)
    means = [table[np.ix_(s, p)].mean((0, 1)) for p, s in zip(drawn.prompts, drawn.seeds, strict=True)]
    at = [k - 1 for k in curve["x"]]
    np.testing.assert_allclose(curve["y"], table.mean((0, 1))[at])
    np.testing.assert_allclose(curve["low"], np.quantile(means, 0.025, axis=0)[at])
    np.testing.assert_allclose(curve["high"], np.quantile(means, 0.975, axis=0)[at])
    assert curve["group"] == "hard" and curve["y_name"] == "problems solved"

    against = {record["name"]: record for record in bootstrap.against(a, b, "hard", chosen)}
    expected = paired_difference(a.values["pass@4"][:, 5:], b.values["pass@4"][:, 5:], 200, 4)
    found = against["pass@4_difference"]
    assert tuple(found[key] for key in expected._fields) == pytest.approx(expected)
    assert found["rival"] == "dpo, t 1"


def test_one_problem_has_no_interval() -> None:
    """Drawn again and again it is the same, which is no certainty."""
    ours, rival = measured(graded("spl", [[4], [2]]), 16), measured(graded("dpo", [[1]]), 16)
    bootstrap = Bootstrap(draws=20)
    records = [*bootstrap.estimates(ours, None, [0]), *bootstrap.against(ours, rival, None, [0])]
    assert {"pass@1", "pass@16_difference", "samples_to_match"} <= {record["name"] for record in records}
    assert all(np.isnan([record["low"], record["high"]]).all() and record["num"] == 1 for record in records)
    assert all(np.isnan(curve["low"]).all() for curve in bootstrap.curve_records(ours, None, [0]))


def test_samples_to_match_a_rival() -> None:
    # The rival solves half of the problems with 16 samples, and each of ours is solved by 2 of 16.
    rival = measured(graded("dpo", [[16] * 10 + [0] * 10]), 16)
    ours = measured(graded("spl", [[2] * 20]), 16)
    *_, found = Bootstrap(draws=300).against(ours, rival, None, range(20))
    expected = next(k for k in range(1, 17) if pass_at_k(16, 2, 16)[k - 1] >= 0.5)
    assert (found["name"], found["value"], found["of"], found["num"]) == ("samples_to_match", expected, 16, 20)
    assert found["low"] < expected < found["high"] and found["reached"] == 1.0
    *_, back = Bootstrap(draws=300).against(rival, ours, None, range(20))
    assert np.isinf(back["value"]) and back["reached"] < 0.1
    *_, itself = Bootstrap(draws=300).against(rival, rival, None, range(20))
    assert (itself["value"], itself["low"], itself["high"], itself["reached"]) == (1.0, 1.0, 1.0, 1.0)
    np.testing.assert_array_equal(
        first_reached(np.array([[0.1, 0.5, 0.5], [0.1, 0.2, 0.3]]), np.array([0.5, 0.4])), [2, np.inf]
    )


def test_records_of_problems() -> None:
    found = measured(graded("spl", [[2, 0], [1, 3]]), 16)
    records = list(item_records(found, ["x", "y"], {"x": "hard"}))
    assert [(r["train_seed"], r["item"], r["group"], r["values"]["correct"]) for r in records] == [
        *((0, "x", "hard", 2), (0, "y", None, 0), (1, "x", "hard", 1), (1, "y", None, 3)),
    ]
    assert records[0]["values"]["samples"] == 16 and records[0]["values"]["pass@1"] == pytest.approx(2 / 16)


def test_approaches_are_counted_among_equal_numbers_of_solutions() -> None:
    """One policy solves a problem in four replies by two ways, the other in two replies by two; a pair is compared."""
    texts = {"spl": ["add a", "add b", "add c", "count"], "dpo": ["add a", "count", "wrong"]}
    arms = [
        Graded(name, "t 1", [None], [[[solution(int(text == "wrong"), text) for text in drawn]] * 2])
        for name, drawn in texts.items()
    ]
    arms[1].solutions[0][1] = [solution(0, "add a"), solution(2, "wrong")]  # a problem with too few
    found, unread = approaches(
        arms, [[], []], lambda _, all_texts: [[int(t == "count") for t in few] for few in all_texts]
    )
    assert unread == 0
    # Of the six pairs of spl's, three have both ways.
    np.testing.assert_allclose(found[0], [[1.5, np.nan]])
    np.testing.assert_allclose(found[1], [[2.0, np.nan]])
    found, unread = approaches(arms, [[], []], lambda _, all_texts: [None for _ in all_texts])
    assert unread == 1 and np.isnan(found).all()


def test_a_judge_is_asked_about_approaches(tmp_path: Path) -> None:
    def first_words(body: dict[str, Any], _: int) -> Answer:
        a, b = re.findall(r"<answer_.>\n(\w+)", body["messages"][1]["content"])
        return reply(f"Verdict: {'same' if a == b else 'different'}")

    prompt = [{"role": "user", "content": "1 + 1?"}]
    with serving(first_words) as (url, bodies):
        judge = Judge(ChatServer(url, "m", retries=0), tmp_path / "judge.jsonl")
        assert by_judge(judge)([prompt], [["add 1", "add 2", "count"]]) == [[0, 0, 1]]
    assert all("same approach" in body["messages"][0]["content"] for body in bodies)


def test_clusters_of_vectors() -> None:
    angles = np.deg2rad([0, 5, 90, 95, 180])
    labels = linked(np.stack([np.cos(angles), np.sin(angles)], 1), 0.1)
    assert labels[0] == labels[1] and labels[2] == labels[3] and len(set(labels)) == 3
    assert linked(np.ones((1, 2)), 0.1) == [0] and len(set(linked(np.ones((3, 2)), 0.1))) == 1
