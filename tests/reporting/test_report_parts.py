"""The parts of a report by themselves: numbers as text, colours, labels, differences."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spl.reporting.browser import browsable
from spl.reporting.charts import Figure, interval_text, thin
from spl.reporting.colours import colours
from spl.reporting.differences import Key, differences, rival
from spl.reporting.evidence import Arm, Evidence, gather
from spl.reporting.fronts import comparisons, front_figure
from spl.reporting.labels import place_labels
from spl.reporting.measures import QUALITY, Measure, at_most_samples, measure
from spl.results import ResultsError, header, write


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.43123, 0.41, 0.4523, "0.431 [0.410, 0.452]"),  # 0.042 wide: two digits of that are thousandths
        (1234.5, 1200.0, 1300.0, "1234 [1200, 1300]"),
        (3.14159, 1.0, 5.5, "3.1 [1.0, 5.5]"),
        (2.0, 2.0, 2.0, "2 [2, 2]"),
        (-0.0, -0.0, 0.0, "0 [0, 0]"),
        (-1e-9, -0.004, 0.004, "0.0000 [-0.0040, 0.0040]"),
        (0.5, None, None, "0.5"),
        (None, None, None, "not known"),
    ],
)
def test_numbers_have_the_digits_that_are_known(
    value: float | None, low: float | None, high: float | None, text: str
) -> None:
    assert interval_text(value, low, high) == text


def test_signs_of_differences() -> None:
    assert interval_text(0.25, -0.5, 1.0, sign=True) == "+0.2 [-0.5, +1.0]"


def test_thin_keeps_both_ends() -> None:
    assert thin(5, 10) == [0, 1, 2, 3, 4]
    assert thin(5, 1) == [0] and thin(5, 0) == []
    assert thin(9, 5) == [0, 2, 4, 6, 8]
    kept = thin(1024, 11, geometric=True)
    assert kept == [2**k - 1 for k in range(11)]


def lightness(colour: str) -> float:
    """L* of CIELAB, by its definition."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    y = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return float(116 * (y ** (1 / 3) if y > 0.008856 else 7.787 * y + 16 / 116) - 16)


def _rgb(colour: str) -> list[float]:
    return [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]


def test_colours_mean_the_policy() -> None:
    found = colours(["base", "dpo", "spl 1.2", "spl 2", "spl 4", "spl 11", "fdpo js", "hdpo"])
    red, green, blue = _rgb(found["base"])
    assert red == green == blue
    red, green, blue = _rgb(found["dpo"])
    assert red > green > blue
    greens = [found[f"spl {ratio}"] for ratio in ("1.2", "2", "4", "11")]
    assert all(_rgb(c)[1] == max(_rgb(c)) for c in greens)
    levels = [lightness(c) for c in greens]
    assert levels == sorted(levels, reverse=True)
    assert len(set(found.values())) == len(found)


def test_colours_are_told_apart_by_people_who_see_no_green() -> None:
    # Deuteranopia as Machado et al. (2009) simulate it on linear RGB.
    matrix = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    found = colours(["base", "dpo", "spl 1.2", "spl 2", "spl 4"])
    seen = {policy: np.array(matrix) @ (np.array(_rgb(colour)) ** 2.2) for policy, colour in found.items()}
    for first, second in combinations(seen, 2):
        assert np.abs(seen[first] - seen[second]).max() > 0.04, (first, second)


def test_a_policy_alone_and_more_policies_than_colours() -> None:
    assert colours(["spl 2"]) == {"spl 2": colours(["spl 7"])["spl 7"]}
    assert len(colours([f"other {k}" for k in range(30)])) == 30


def test_labels_hide_nothing() -> None:
    domains, size = ((0.0, 1.0), (0.0, 1.0)), (320, 250)
    assert place_labels([(0.5, 0.5, "dpo")], domains, size) == ["above right"]
    assert place_labels([(0.99, 0.99, "dpo")], domains, size) == ["below left"]  # the only corner inside the chart
    together = place_labels([(0.5, 0.5, "dpo")] * 6, domains, size)
    assert sorted(filter(None, together)) == sorted({*together} - {""})  # each place once, the rest not at all
    assert len(set(together) - {""}) == 4


def evidence(tmp_path: Path, values: dict[str, list[float | None]], name: str = "reward") -> Evidence:
    records: list[dict[str, Any]] = []
    for policy, numbers in values.items():
        place = {"policy": policy, "setting": "t 1", "group": None}
        records += [
            {"kind": "item", **place, "item": str(k), "values": {name: value}} for k, value in enumerate(numbers)
        ]
        records.append({"kind": "estimate", **place, "name": name, "value": 0.0})
    write(tmp_path / "a.jsonl", header("diversity-quality", {}), records)
    return gather([tmp_path / "a.jsonl"])


def test_differences_are_paired(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 10, 40)  # what all policies share: unpaired, it would hide the difference
    gain = draw.normal(1, 0.5, 40)
    found = differences(evidence(tmp_path, {"dpo": list(hard), "spl 2": list(hard + gain)}))
    ((key, (against, interval)),) = found.items()
    assert key == Key("diversity-quality", Arm("spl 2", "t 1"), "reward", None)
    assert against == Arm("dpo", "t 1")
    assert interval.value == pytest.approx(gain.mean())
    error = gain.std() / 40**0.5
    assert (interval.low, interval.high) == pytest.approx(
        (gain.mean() - 1.96 * error, gain.mean() + 1.96 * error), abs=0.3 * error
    )


def test_an_item_without_a_value_tells_no_difference(tmp_path: Path) -> None:
    found = differences(evidence(tmp_path, {"dpo": [1.0, None, 5.0, 3.0], "spl 2": [2.0, 7.0, None, 3.0]}))
    ((_, interval),) = found.values()
    assert (interval.value, interval.low, interval.high, interval.num) == (0.5, 0.0, 1.0, 2)
    # One item is the same in every draw: its interval would be a point.
    assert not differences(evidence(tmp_path, {"dpo": [1.0, None, 5.0], "spl 2": [2.0, 7.0, None]}))


def test_whom_others_are_held_against(tmp_path: Path) -> None:
    arms = [Arm("base", "t 1"), Arm("dpo", "t 1.5"), Arm("dpo", "t 1"), Arm("spl 2", "t 1")]
    assert rival(arms, None) == Arm("dpo", "t 1")
    assert rival([arms[0], arms[3]], None) == Arm("base", "t 1")
    assert rival(arms, "dpo, t 1.5") == Arm("dpo", "t 1.5")
    found = differences(evidence(tmp_path, {"dpo": [1.0, 2.0], "spl 2": [3.0, 4.0]}), "spl 2")
    assert next(iter(found.values()))[1].value == -2.0
    with pytest.raises(ResultsError, match="baseline must be one of dpo, t 1, spl 2, t 1, but is 'grpo'"):
        differences(evidence(tmp_path, {"dpo": [1.0, 2.0], "spl 2": [3.0, 4.0]}), "grpo")


def test_samples_of_files_that_share_an_item_are_kept_apart(tmp_path: Path) -> None:
    for name, policy, asked in (("a", "dpo", "One?"), ("b", "spl 2", "One?"), ("c", "spl 2", "Two?")):
        prompt = {"kind": "prompt", "item": "0", "messages": [{"role": "user", "content": asked}]}
        sample = {"kind": "sample", "item": "0", "index": 0, "text": f"{policy}: {asked}"}
        write(tmp_path / f"{name}.jsonl", header("sample", {}, policy=policy, setting="t 1"), [prompt, sample, sample])
    example = {"kind": "example", "policy": "base", "setting": "t 1", "item": "9", "prompt": "Nine?", "texts": ["9"]}
    write(tmp_path / "d.jsonl", header("best-of-n", {}), [example, example | {"policy": "dpo"}])
    found = browsable(gather([tmp_path]), 10, 1)
    assert [prompt["messages"][0]["content"] for prompt in found["prompts"]] == ["One?", "Two?", "Nine?"]
    assert [column["label"] for column in found["columns"]] == ["base, t 1", "dpo, t 1", "spl 2, t 1"]
    texts = [[[text for text, *_ in replies] for replies in column] for column in found["replies"]]
    assert texts == [[[], [], ["9"]], [["dpo: One?"], [], []], [["spl 2: One?"], ["spl 2: Two?"], []]]
    assert found["given"] == {"prompts": 3, "replies": 7}


def test_fronts_are_compared_from_the_side_of_spl() -> None:
    area = {"name": "hypervolume_difference", "policy": "dpo + temperature", "rival": "spl", "greater": 0.125}
    gap = {
        "name": "front_gap",
        "policy": "dpo + temperature",
        "rival": "spl",
        "value": -0.4,
        "low": -0.5,
        "high": -0.31,
    }
    others = area | {"rival": "hdpo", "value": 0.0, "low": 0.0, "high": 0.0}
    (said,) = comparisons([area | {"value": -0.21, "low": -0.3, "high": -0.12}, gap, others], QUALITY["reward"])
    assert said == (
        "spl against dpo + temperature: area under the front +0.21 [+0.12, +0.30] of the box, larger in 88% of the "
        "draws, reward better by +0.40 [+0.31, +0.50] at equal diversity."
    )


def test_names_of_measures() -> None:
    assert measure("pass@16").title == "Solved, 16 samples"
    assert measure("pass@16_difference").title == "Solved, 16 samples, above the rival"
    assert measure("never_heard_of") == Measure("never heard of")
    assert at_most_samples(["pass@1", "pass@64", "repeats", "repeats", "pass@64_difference"]) == [
        *("pass@64", "repeats", "pass@64_difference")
    ]
    assert [measure(name).axis for name in ("reward", "brier", "length")] == [
        "Reward (mean of the replies), better →",
        "← better, Brier score (0 to 2)",
        "Length (tokens)",
    ]


def test_measures_by_which_all_are_equal_have_no_front(tmp_path: Path) -> None:
    def figure(*vendi: float) -> Figure | None:
        named = zip(("base", "dpo", "spl 2"), vendi, strict=True)
        places = [({"kind": "estimate", "policy": policy, "setting": "t 1"}, value) for policy, value in named]
        records = [place | {"name": "vendi", "value": value} for place, value in places]
        records += [place | {"name": "reward", "value": k} for k, (place, _) in enumerate(places)]
        write(tmp_path / "a.jsonl", header("diversity-quality", {}), records)
        found = gather([tmp_path / "a.jsonl"])
        return front_figure(found, colours(found.policies()))

    drawn = figure(1.0, 1.0, 2.0)
    assert drawn is not None and [panel.keys for panel in drawn.panels] == [
        ("Vendi score (effective replies)", "Reward (mean of the replies)")
    ]
    assert figure(1.0, 1.0, 1.0) is None


def test_a_difference_is_of_a_set_of_problems_and_of_its_parts(tmp_path: Path) -> None:
    """Two policies on six problems, three of them hard: of all the gap is 1, of the hard ones 2."""
    records = []
    for arm, gain in (("sft", 0), ("spl 2", 1)):
        for k in range(6):
            group, value = ("sums, hard", 2.0 * gain) if k < 3 else ("sums, easy", 0.0)
            item = {"kind": "item", "policy": arm, "setting": "t 1", "train_seed": 0, "item": str(k), "group": group}
            records.append(item | {"values": {"pass@1": value + k}})
        for group in ("sums", "sums, hard"):
            of = {"policy": arm, "setting": "t 1", "train_seed": None, "name": "pass@1", "group": group}
            records.append({"kind": "estimate", **of, "value": 1.0, "low": 0.0, "high": 2.0, "num": 6})
    write(tmp_path / "best.jsonl", header("best-of-n", {}), records)
    found = {key.group: interval for key, (_, interval) in differences(gather([tmp_path])).items()}
    assert found["sums"].value == pytest.approx(1.0)
    assert found["sums, hard"].value == pytest.approx(2.0)
