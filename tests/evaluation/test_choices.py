"""Measures of multiple-choice answers against torchmetrics, scipy and by hand; temperatures that are known."""

import math

import pytest
import torch
from scipy.stats import binom, binomtest
from torchmetrics.functional.classification import binary_calibration_error

from spl.evaluation.asked import Asked, collect, split
from spl.evaluation.choices import Answers, wilson
from spl.evaluation.scaling import FITTED, Scaling, records_of
from spl.types import UserError


def answered(num: int, runs: int = 1, seed: int = 0, sharpness: float = 2.0) -> Asked:
    """An overconfident model: answers come from its law at a temperature of its sharpness."""
    generator = torch.Generator().manual_seed(seed)
    scores = sharpness * torch.randn(runs, num, 1, 4, generator=generator, dtype=torch.double)
    law = (scores[0, :, 0] / sharpness).softmax(-1)
    answers = torch.multinomial(law, 1, generator=generator).squeeze(1)
    return Asked([f"q {k}" for k in range(num)], answers, scores.log_softmax(-1) - 0.5)


def certain(confidence: float, num: int) -> Answers:
    """The same confidence in the first of two answers, which is right every other time."""
    law = torch.tensor([confidence, 1 - confidence], dtype=torch.double).expand(1, num, 2)
    return Answers([str(k) for k in range(num)], torch.arange(num) % 2, law, torch.ones(1, num))


def test_values_and_measures_of_one_run() -> None:
    asked = answered(200)
    law = asked.scores[0, :, 0].softmax(-1)
    right = torch.tensor([p[a].item() for p, a in zip(law, asked.answers, strict=True)])
    found = asked.at([1.0]).measures(15, 20, 0)
    assert found["log_loss"].value == pytest.approx(-right.log().mean().item(), rel=1e-5)
    brier = [sum((p[k] - int(k == a)) ** 2 for k in range(4)) for p, a in zip(law, asked.answers, strict=True)]
    assert found["brier"].value == pytest.approx(torch.stack(brier).mean().item())
    confidence, choice = law.max(-1)
    correct = (choice == asked.answers).int()
    assert found["accuracy"].value == pytest.approx(correct.float().mean().item())
    expected = binary_calibration_error(confidence.float(), correct, n_bins=15).item()
    assert found["ece"].value == pytest.approx(expected, abs=1e-6)
    assert found["mass"].value == pytest.approx(math.exp(-0.5))
    assert found["ece"].value > found["ece_if_calibrated"].interval().high  # it is overconfident


def test_several_runs_are_averaged_and_drawn_again() -> None:
    asked = answered(40, runs=3)
    apart = [Asked(asked.items, asked.answers, asked.scores[k : k + 1]).at([1.0]) for k in range(3)]
    singly = [of.measures(15, 20, 0) for of in apart]
    together = asked.at([1.0, 1.0, 1.0]).measures(15, 20, 0)
    for name in ("accuracy", "ece", "ece_equal_mass", "aurc", "brier"):
        assert together[name].value == pytest.approx(sum(of[name].value for of in singly) / 3)
    low, high = together["brier"].interval()[1:3]
    assert low < together["brier"].value < high


def test_the_error_of_a_calibrated_model_of_few_questions() -> None:
    # All confidences in one bin: the error is |Binomial(N, c) / N - c|, whose mean scipy gives.
    num, confidence = 20, 0.7
    expected = sum(binom.pmf(k, num, confidence) * abs(k / num - confidence) for k in range(num + 1))
    found = certain(confidence, num).measures(15, 20, 0)["ece_if_calibrated"]
    assert found.value == pytest.approx(expected, abs=0.02)  # of 200 simulations, whose standard error is .005
    assert found.value > 0.05


def test_reliability_and_its_intervals() -> None:
    first, mass, risk = certain(0.7, 30).curves(15, 20, 0)
    low, high = binomtest(15, 30).proportion_ci(method="wilson")
    assert (first["x"], first["y"], first["weight"]) == ([pytest.approx(0.7)], [0.5], [30])
    assert (first["low"], first["high"]) == ([pytest.approx(low)], [pytest.approx(high)])
    assert sum(mass["weight"]) == pytest.approx(30)
    assert risk["y"] == pytest.approx([0.5] * 20)  # all are equally sure
    ends = wilson(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 3.0]))
    assert (ends[0][0], ends[1][1]) == (0, 1)


def test_spl_as_a_temperature_of_dpo_is_found() -> None:
    dpo = answered(60)
    spl = Asked(dpo.items, dpo.answers, (dpo.scores / 2).log_softmax(-1))
    scaling = Scaling(15, 20, 0, temperatures=(2.0,), base="base", dpo="dpo")
    asked = {"base": answered(60, sharpness=1.0), "dpo": dpo, "spl": spl}
    records = records_of("mmlu", *split(asked, 0.4, 0, "mmlu"), scaling)
    found = {(r["policy"], r["setting"], r["name"]): r for r in records if r["kind"] == "estimate"}
    assert found["spl", "t 1", "temperature_of_dpo"]["value"] == pytest.approx(2, abs=1e-3)
    assert found["spl", "t 1", "gap_to_dpo_at_temperature"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["spl", "t 1", "gap_to_dpo"]["value"] > 0.05
    # DPO at that temperature is SPL in every figure, and so is the temperature fitted to either.
    for name in ("ece", "brier", "log_loss", "aurc"):
        assert found["dpo", "t 2", name]["value"] == pytest.approx(found["spl", "t 1", name]["value"])
        assert found["dpo", FITTED, name]["value"] == pytest.approx(found["spl", FITTED, name]["value"], abs=1e-3)
    ratio = found["dpo", FITTED, "temperature"]["value"] / found["spl", FITTED, "temperature"]["value"]
    assert ratio == pytest.approx(2, rel=1e-3)
    assert found["dpo", FITTED, "log_loss"]["value"] < found["dpo", "t 1", "log_loss"]["value"]
    difference = found["spl", "t 1", "brier_minus_base"]
    base, own = found["base", "t 1", "brier"], found["spl", "t 1", "brier"]
    assert difference["value"] == pytest.approx(own["value"] - base["value"])
    assert {r["setting"] for r in records if r.get("policy") == "base"} >= {"t of dpo", "t of spl"}


def test_the_split_holds_no_question_twice() -> None:
    held, kept = split({"a": answered(10)}, 0.3, 0, "f")
    assert (len(held["a"].items), len(kept["a"].items)) == (3, 7)
    assert sorted(held["a"].items + kept["a"].items) == sorted(answered(10).items)
    assert kept["a"].scores.shape == (1, 7, 1, 4)
    with pytest.raises(UserError, match=r"f: of 10 questions, the share fit 0\.01 leaves none on one side"):
        split({"a": answered(10)}, 0.01, 0, "f")


def test_only_what_all_were_asked_is_compared() -> None:
    two, three = torch.zeros(1, 2), torch.zeros(3, 3)
    said = {"a": [{"x": two, "y": three, "z": two}], "b": [{"x": two, "y": three}, {"z": two, "y": three, "x": two}]}
    found = collect({"x": 0, "z": 0, "y": 2}, said)
    assert found["a"].items == found["b"].items == ["x", "y"]
    assert found["b"].scores.shape == (2, 2, 3, 3)
    assert found["b"].answers.tolist() == [0, 2]
    law = found["a"].at([1.0]).law
    assert law.tolist() == [[pytest.approx([1 / 2, 1 / 2, 0]), pytest.approx([1 / 3] * 3)]]
    with pytest.raises(UserError, match="fewer than two questions"):
        collect({"x": 0, "z": 0}, said)
