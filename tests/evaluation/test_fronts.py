"""Fronts, areas and comparisons of families against the definitions, point by point."""

import itertools

import numpy as np
import pytest

from spl.evaluation.fronts import Arm, Cloud, areas, families_of, front_records, heights

RANDOM = np.random.default_rng(0)


def covered(points: list[tuple[float, float]], corner: tuple[float, float]) -> float:
    """The area above a corner and below some point, cell by cell of the grid that the points' lines make."""
    xs, ys = (sorted({corner[k], *(p[k] for p in points if p[k] > corner[k])}) for k in (0, 1))
    cells = ((a, b, c, d) for a, b in itertools.pairwise(xs) for c, d in itertools.pairwise(ys))
    return sum((b - a) * (d - c) for a, b, c, d in cells if any(x >= b and y >= d for x, y in points))


def test_the_covered_area_by_hand() -> None:
    assert covered([(3.0, 1.0), (1.0, 4.0), (2.0, 2.0), (2.0, 1.0), (-1.0, 9.0)], (0.0, 0.0)) == 4 + 2 + 1


def test_families() -> None:
    dpo = [Arm("dpo", setting) for setting in ("t 1", "t 1.2", "t 1.5", "top_p 0.9", "t 1.2 min_p 0.1", "global 1.2")]
    spl = [Arm("spl 1.2", "t 1"), Arm("spl 2", "t 1")]
    hot, base, greedy = Arm("spl 2", "t 1.3"), Arm("base", ""), Arm("hdpo", "greedy")
    found = families_of([*dpo, *spl, base, greedy])
    assert found == {
        "dpo + temperature": dpo[:3],
        "dpo + top_p": [dpo[0], dpo[3]],
        "dpo + temperature, min_p": [dpo[0], dpo[4]],
        "dpo + global temperature": [dpo[0], dpo[5]],
        "spl": spl,
        "base": [base],
        "hdpo + greedy": [greedy],
    }
    assert families_of([*spl, hot]) == {"spl": spl, "spl + temperature": [*spl, hot]}
    assert families_of([*spl, base], {"spl 2": "mine", "base": "mine"}) == {"spl": spl[:1], "mine": [spl[1], base]}


def test_areas_and_heights_are_those_of_the_definition() -> None:
    x, y = RANDOM.normal(size=(2, 40, 5))
    x[3, 0] = x[3, 1]
    cloud = Cloud(x, y)
    expected = [covered(list(zip(a, b, strict=True)), (0.0, 0.0)) for a, b in zip(x, y, strict=True)]
    assert areas(cloud) == pytest.approx(expected)
    grid = np.linspace(-1, 2, 7)
    for row, (a, b) in zip(heights(cloud, grid), zip(x, y, strict=True), strict=True):
        for height, at in zip(row, grid, strict=True):
            reached = [v for u, v in zip(a, b, strict=True) if u >= at]
            assert np.isnan(height) if not reached else height == max(reached)


def records_of(values: dict[str, dict[Arm, list[float]]], draws: int = 200) -> dict[tuple[str, str], dict]:
    arms = list(next(iter(values.values())))
    matrices = {name: {arm: np.array([row]) for arm, row in of.items()} for name, of in values.items()}
    found = front_records(matrices, families_of(arms), {"spread": 1}, {"loss": -1}, draws, 0)
    return {(record["name"], record["policy"]): record for record in found}


def test_a_pair_of_measures_by_hand() -> None:
    a, b, c, d = (Arm(*names) for names in (("spl 1", "t 1"), ("spl 2", "t 1"), ("dpo", "t 1"), ("dpo", "t 2")))
    spread = {a: [0.2, 0.2], b: [1.0, 1.0], c: [0.0, 0.0], d: [0.6, 0.6]}
    loss = {a: [2.0, 2.0], b: [4.0, 4.0], c: [1.0, 1.0], d: [5.0, 5.0]}
    found = records_of({"spread": spread, "loss": loss})
    # Scaled: a (.2, .75), b (1, .25), c (0, 1), d (.6, 0).
    assert found["hypervolume", "spl"]["value"] == pytest.approx(0.2 * 0.75 + 0.8 * 0.25)
    assert found["hypervolume", "dpo + temperature"]["value"] == 0
    difference = found["hypervolume_difference", "spl"]
    assert (difference["rival"], difference["value"]) == ("dpo + temperature", pytest.approx(0.35))
    assert (difference["low"], difference["high"]) == (pytest.approx(0.35), pytest.approx(0.35))
    assert difference["greater"] == 1
    assert difference["dominates"] == 0  # c is not matched in loss
    assert difference["dominated"] == 0
    # At a spread of .2 to .6 SPL's best loss is 2 up to .2, then 4; DPO's is 5.
    gap = found["front_gap", "spl"]["value"]
    assert gap == pytest.approx((1 * 3 + 32 * 1) / 33)
    front = found["front", "dpo + temperature"]
    assert (front["x"][0], front["x"][-1]) == (0, 1)
    assert front["y"][0] == pytest.approx(1)
    assert front["y"][1] == pytest.approx(5)
    assert np.isnan(front["y"][-1])
    assert (front["x_name"], front["y_name"], front["group"]) == ("spread", "loss", "spread / loss")


def test_the_gap_to_a_single_arm_is_as_sure_as_the_difference_of_the_two_arms_that_it_compares() -> None:
    """By the normal approximation, where a family of one arm lies well between two of the other."""
    random = np.random.default_rng(1)
    base, arms = Arm("base", ""), [Arm(f"spl {k}", "t 1") for k in range(3)]
    spread = {base: random.normal(0.4, 0.1, 200)} | {
        a: random.normal(0.2 + 0.3 * k, 0.1, 200) for k, a in enumerate(arms)
    }
    loss = {base: random.normal(0.5, 0.1, 200)} | {a: random.normal(0.3 * k, 0.1, 200) for k, a in enumerate(arms)}
    found = records_of({"spread": spread, "loss": loss}, draws=2000)["front_gap", "base"]
    better = loss[arms[1]] - loss[base]
    half = 1.96 * better.std() / np.sqrt(200)
    expected = better.mean(), better.mean() - half, better.mean() + half
    assert (found["value"], found["low"], found["high"]) == pytest.approx(expected, abs=0.003)


def test_a_prompt_that_an_arm_cannot_tell_counts_for_none() -> None:
    a, b = Arm("a", "t 1"), Arm("b", "t 1")
    found = records_of({"spread": {a: [1.0, 3.0, 90.0], b: [5.0, 7.0, np.nan]}, "loss": {a: [1, 1, 1], b: [2, 2, 2]}})
    assert found["front", "a"]["x"][0] == pytest.approx(2)
    assert found["hypervolume", "a"]["num"] == 2


def test_measures_that_do_not_differ_have_no_front() -> None:
    a, b = Arm("a", "t 1"), Arm("b", "t 1")
    assert not records_of({"spread": {a: [1.0, 2.0], b: [2.0, 1.0]}, "loss": {a: [1.0, 1.0], b: [2.0, 2.0]}})


def test_shares_of_draws_against_brute_force() -> None:
    """Two arms a family, prompts drawn again as spl.intervals does, every draw looked at by itself."""
    arms = [Arm("a 1", "t 1"), Arm("a 2", "t 1"), Arm("b 1", "t 1"), Arm("b 2", "t 1")]
    spread = {arm: RANDOM.normal(0.1 * k, 1, 12).tolist() for k, arm in enumerate(arms)}
    loss = {arm: RANDOM.normal(0, 1, 12).tolist() for arm in arms}
    found = records_of({"spread": spread, "loss": loss}, draws=400)["hypervolume_difference", "a"]
    drawn = np.random.default_rng((0, 0)).integers(12, size=(400, 12))
    means = {arm: (np.mean(spread[arm]), -np.mean(loss[arm])) for arm in arms}
    corner = (min(x for x, _ in means.values()), min(y for _, y in means.values()))
    box = np.prod([max(p[k] for p in means.values()) - corner[k] for k in (0, 1)])
    differences, dominates = [], []
    for index in drawn:
        at = {arm: (np.mean(np.array(spread[arm])[index]), -np.mean(np.array(loss[arm])[index])) for arm in arms}
        a, b = [at[arm] for arm in arms[:2]], [at[arm] for arm in arms[2:]]
        differences.append((covered(a, corner) - covered(b, corner)) / box)
        matched = [any(p[0] >= q[0] and p[1] >= q[1] for p in a) for q in b]
        dominates.append(all(matched))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["greater"] == pytest.approx(np.mean([(x > 0) + (x == 0) / 2 for x in differences]))
    assert found["dominates"] == pytest.approx(np.mean(dominates))


def test_families_of_equal_arms_are_level() -> None:
    """The share of draws in which one is above the other is spread evenly over repetitions, not near 0 or 1."""
    greater = []
    for _ in range(30):
        values = {
            name: {Arm(f"{f} {k}", "t 1"): RANDOM.normal(size=40).tolist() for f, k in itertools.product("ab", (1, 2))}
            for name in ("spread", "loss")
        }
        greater.append(records_of(values, draws=100)["hypervolume_difference", "a"]["greater"])
    assert 0.3 < np.mean(greater) < 0.7
