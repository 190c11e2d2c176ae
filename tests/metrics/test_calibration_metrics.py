"""Calibration against torchmetrics, scikit-learn, enumeration over raters and bins cut by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from spl.metrics.calibration import (
    ChoiceCalibration,
    ComparisonCalibration,
    brier_score,
    calibration_error,
    equal_mass_bins,
    expected_calibration_error,
    log_loss,
)
from spl.types import UserError


def draws(num: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [num] and hard labels [num] of an overconfident judge."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num, generator=generator, dtype=torch.float64)
    labels = (torch.rand(num, generator=generator) < (0.4 * logits).sigmoid()).double()
    return logits, labels


def both_ways(logits: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    return torch.cat([p, 1 - p]), torch.cat([shares, 1 - shares])


def ece_of_array_split(predictions: Tensor, labels: Tensor, num_bins: int) -> float:
    """Equal-mass bins by hand; the number of predictions must be a multiple of the number of bins."""
    assert len(predictions) % num_bins == 0
    order = np.argsort(predictions.numpy())
    parts = np.array_split(order, num_bins)
    p, y = predictions.numpy(), labels.numpy()
    return float(np.mean([abs(p[part].mean() - y[part].mean()) for part in parts]))


def figures(metric: Any, *inputs: Tensor) -> dict[str, float]:
    metric.update(*inputs)
    return {name: value.item() for name, value in metric.compute().figures.items()}


@pytest.mark.parametrize("num_bins", [10, 15])
def test_equal_width_error_is_torchmetrics(num_bins: int) -> None:
    logits, labels = draws()
    p = logits.sigmoid()
    expected = binary_calibration_error(p.float(), labels.int(), n_bins=num_bins).item()
    assert expected > 0.1
    assert expected_calibration_error(p, labels, num_bins).item() == pytest.approx(expected, abs=1e-6)


def test_equal_mass_error_is_that_of_bins_cut_by_hand() -> None:
    logits, labels = draws(405)
    expected = ece_of_array_split(logits.sigmoid(), labels, 15)
    assert expected > 0.1
    found = expected_calibration_error(logits.sigmoid(), labels, equal_mass=True)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_equal_mass_bins_are_sklearns_quantile_bins() -> None:
    logits, labels = draws(400)
    p, order = logits.sigmoid(), logits.argsort()
    cells = torch.stack([torch.ones_like(p), p[order], labels[order]])
    weight, predictions, shares = equal_mass_bins(cells, 10)
    # 399 gaps between the values that quantiles are taken of, so none of the inner nine falls on a value.
    label_means, prediction_means = calibration_curve(labels.numpy(), p.numpy(), n_bins=10, strategy="quantile")
    assert weight.tolist() == pytest.approx([40] * 10)
    assert (predictions / weight).tolist() == pytest.approx(prediction_means.tolist(), abs=1e-12)
    assert (shares / weight).tolist() == pytest.approx(label_means.tolist(), abs=1e-12)


def test_a_weight_is_so_many_copies() -> None:
    logits, labels = draws(60)
    weights = torch.arange(60) % 4
    copies = (logits.repeat_interleave(weights).sigmoid(), labels.repeat_interleave(weights))
    for equal_mass in (False, True):
        found = expected_calibration_error(logits.sigmoid(), labels, weights=weights, equal_mass=equal_mass)
        assert found.item() == pytest.approx(expected_calibration_error(*copies, equal_mass=equal_mass).item())


def test_equal_predictions_are_split_by_share_not_by_order() -> None:
    p = torch.full((30,), 0.5)
    for labels in (torch.tensor([0.0] * 15 + [1.0] * 15), torch.tensor([0.0, 1.0] * 15)):
        assert expected_calibration_error(p, labels, equal_mass=True).item() == pytest.approx(0, abs=1e-12)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=40),
    st.integers(2, 20),
)
def test_equal_mass_bins_are_equal_and_lose_nothing(rows: list[tuple[float, float, float]], num_bins: int) -> None:
    values = torch.tensor(sorted(rows), dtype=torch.float64)
    weights = values[:, 2]
    if weights.sum() < 1e-3:
        return
    cells = torch.stack([weights, weights * values[:, 0], weights * values[:, 1]])
    bins = equal_mass_bins(cells, num_bins)
    assert bins[0].tolist() == pytest.approx([weights.sum().item() / num_bins] * num_bins)
    assert bins.sum(1).tolist() == pytest.approx(cells.sum(1).tolist())
    means = bins[1] / bins[0]
    assert (means.diff() > -1e-9).all()


def test_brier_and_log_loss_are_sklearns() -> None:
    logits, labels = draws()
    p = torch.stack([1 - logits.sigmoid(), logits.sigmoid()], 1)
    onehot = torch.stack([1 - labels, labels], 1)
    expected = 2 * brier_score_loss(labels.numpy(), p[:, 1].numpy())
    assert brier_score(p, onehot).mean().item() == pytest.approx(expected)
    assert log_loss(p.log(), onehot).mean().item() == pytest.approx(sklearn_log_loss(labels.numpy(), p.numpy()))


def test_multi_class_brier_and_log_loss_are_sklearns() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 4, generator=generator, dtype=torch.float64).softmax(1)
    answers = torch.randint(4, (50,), generator=generator)
    onehot = torch.eye(4, dtype=torch.float64)[answers]
    expected = brier_score_loss(answers.numpy(), p.numpy(), labels=[0, 1, 2, 3], scale_by_half=False)
    assert brier_score(p, onehot).mean().item() == pytest.approx(expected)
    by_sklearn = sklearn_log_loss(answers.numpy(), p.numpy(), labels=[0, 1, 2, 3])
    assert log_loss(p.log(), onehot).mean().item() == pytest.approx(by_sklearn)


def test_a_share_is_the_mean_over_raters() -> None:
    logit, raters = torch.tensor(0.7, dtype=torch.float64), [1, 1, 1, 0, 0]
    p = logit.sigmoid().item()
    found = figures(ComparisonCalibration(), logit[None], torch.tensor([3 / 5]))
    assert found["brier"] == pytest.approx(np.mean([2 * (p - y) ** 2 for y in raters]), abs=1e-6)
    assert found["log_loss"] == pytest.approx(np.mean([-np.log(p if y else 1 - p) for y in raters]), abs=1e-6)


def test_comparisons_count_in_both_directions() -> None:
    logits, labels = draws(405)
    p, y = both_ways(logits, labels)
    found = figures(ComparisonCalibration(), logits, labels)
    by_torchmetrics = binary_calibration_error(p.float(), y.int(), n_bins=15).item()
    assert found["ece"] == pytest.approx(by_torchmetrics, abs=1e-6)
    # Two predictions of one cell are one to the metric: so many could be on the wrong side of one of 14 edges.
    assert found["ece_equal_mass"] == pytest.approx(ece_of_array_split(p, y, 15), abs=14 / 810)
    assert found["brier"] == pytest.approx(2 * brier_score_loss(y.numpy(), p.numpy()))
    assert found["log_loss"] == pytest.approx(sklearn_log_loss(y.numpy(), p.numpy()))
    assert "share_gap" not in found
    flip = torch.where(torch.arange(405) % 3 == 0, -1.0, 1.0)
    flipped = figures(ComparisonCalibration(), logits * flip, torch.where(flip > 0, labels, 1 - labels))
    assert flipped == pytest.approx(found, abs=1e-9)


def test_equal_mass_error_in_cells_is_that_of_the_predictions() -> None:
    logits, labels = draws(3000)
    exact = expected_calibration_error(*both_ways(logits, labels), equal_mass=True).item()
    found = figures(ComparisonCalibration(), logits, labels)["ece_equal_mass"]
    assert exact > 0.1
    assert found == pytest.approx(exact, abs=1e-3)


def test_chosen_first_is_not_perfect_knowledge() -> None:
    """A judge who always says 90 % and is right in 60 of 100 pairs, all of which list the chosen response first."""
    logits = torch.logit(torch.tensor([0.9] * 60 + [0.1] * 40))
    found = figures(ComparisonCalibration(12), logits, torch.ones(100))
    assert found["ece"] == pytest.approx(0.3, abs=1e-6)
    assert found["ece_equal_mass"] == pytest.approx(0.3, abs=1e-6)


def test_rounding_noise_about_one_half_is_no_order() -> None:
    """Margins of a policy that still is its reference, up to the last digits."""
    noise = 1e-6 * torch.where(torch.arange(90) % 3 == 0, -1.0, 1.0)
    found = figures(ComparisonCalibration(), noise, torch.ones(90))
    assert found["ece"] == pytest.approx(0, abs=1e-6)
    assert found["ece_equal_mass"] == pytest.approx(0, abs=1e-6)


def test_gap_and_correlation_with_shares() -> None:
    logits, _ = draws(50)
    shares = (0.3 * logits + 0.2 * torch.sin(torch.arange(50))).sigmoid()
    found = figures(ComparisonCalibration(), logits, shares)
    p, s = (x.numpy() for x in both_ways(logits, shares))
    assert found["share_gap"] == pytest.approx(np.abs(p - s).mean())
    assert found["share_correlation"] == pytest.approx(np.corrcoef(p, s)[0, 1])


def test_one_soft_share_is_enough_and_a_tie_is_none() -> None:
    assert "share_gap" not in figures(ComparisonCalibration(), torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]))
    found = figures(ComparisonCalibration(), torch.zeros(3), torch.tensor([0.0, 0.5, 0.7]))
    assert found["share_gap"] == pytest.approx((0.5 + 0 + 0.2) / 3)
    assert found["share_correlation"] == 0


def test_the_reliability_diagram_is_the_mean_of_each_bin() -> None:
    logits, labels = draws(300)
    metric = ComparisonCalibration(10)
    metric.update(logits, labels)
    result = metric.compute()
    p, y = both_ways(logits, labels)
    for k in range(10):
        inside = (p >= k / 10) & (p < (k + 1) / 10)
        expected = [inside.sum() / 2, p[inside].sum() / 2, y[inside].sum() / 2]
        assert result.bins[:, k].tolist() == pytest.approx([e.item() for e in expected])
    assert result.num == 300
    assert calibration_error(result.bins).item() == result.figures["ece"].item()


def test_saturated_margins() -> None:
    found = figures(ComparisonCalibration(), torch.tensor([50.0, -50.0, 50.0, 5000.0]), torch.tensor([1.0, 1, 0.5, 1]))
    assert found["log_loss"] == pytest.approx((0 + 50 + 25 + 0) / 4)
    assert found["brier"] == pytest.approx((0 + 2 + 1 + 0) / 4)
    assert found["ece"] == pytest.approx(1.5 / 4)
    # Seven bins hold p = 1, seven p = 0, and the middle one both alike, with labels that are 1/2 in the mean.
    assert found["ece_equal_mass"] == pytest.approx(1.5 / 4 * 14 / 15)


def halves(metric: Any, whole: tuple[Tensor, Tensor], cut: int) -> None:
    """States of two processes, added as DDP adds them, give what one process has."""
    states: dict[str, list[Tensor]] = {"cells": [], "totals": []}
    for part in (slice(None, cut), slice(cut, None)):
        metric.reset()
        metric.update(*(x[part] for x in whole))
        for name, parts in states.items():
            assert metric._reductions[name] is not None
            parts.append(getattr(metric, name))
    merged = {name: metric._reductions[name](torch.stack(parts)) for name, parts in states.items()}
    metric.reset()
    metric.update(*whole)
    expected = metric.compute().figures
    for name, state in merged.items():
        setattr(metric, name, state)
    metric._computed = None
    found = metric.compute().figures
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-12), name


def test_two_processes_give_the_whole() -> None:
    logits, labels = draws(100)
    halves(ComparisonCalibration(), (logits, labels * 0.8), 30)
    halves(ChoiceCalibration(), (logits.view(25, 4), torch.arange(25) % 4), 11)


def choices(num: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = 2 * torch.randn(num, 4, generator=generator, dtype=torch.float64)
    answers = torch.multinomial((0.4 * scores).softmax(1), 1, generator=generator)[:, 0]
    return scores, answers


def test_letter_calibration() -> None:
    scores, answers = choices()
    found = figures(ChoiceCalibration(), scores - 30, answers)  # a constant of the question is no evidence
    p = scores.softmax(1)
    confidence, choice = p.max(1)
    by_torchmetrics = multiclass_calibration_error(p.float(), answers, num_classes=4, n_bins=15).item()
    assert found["ece"] == pytest.approx(by_torchmetrics, abs=1e-6)
    by_hand = ece_of_array_split(confidence, (choice == answers).double(), 15)
    assert found["ece_equal_mass"] == pytest.approx(by_hand, abs=14 / 300)
    assert found["accuracy"] == pytest.approx((choice == answers).double().mean().item())
    expected = brier_score_loss(answers.numpy(), p.numpy(), labels=[0, 1, 2, 3], scale_by_half=False)
    assert found["brier"] == pytest.approx(expected)
    assert found["log_loss"] == pytest.approx(sklearn_log_loss(answers.numpy(), p.numpy(), labels=[0, 1, 2, 3]))


def test_questions_of_different_length() -> None:
    """Two letters padded to four are what two letters are alone."""
    rows = [torch.tensor([-1.0, -3.0]), torch.tensor([-5.0, -4.0, -3.0, -6.0])]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
    together = figures(ChoiceCalibration(), padded, torch.tensor([1, 2]))
    alone = [figures(ChoiceCalibration(), r[None], torch.tensor([a])) for r, a in zip(rows, (1, 2), strict=True)]
    for name in ("accuracy", "brier", "log_loss"):
        assert together[name] == pytest.approx(sum(one[name] for one in alone) / 2)
    p = np.exp(-1) / (np.exp(-1) + np.exp(-3))
    assert alone[0]["ece"] == pytest.approx(p)
    assert alone[0]["brier"] == pytest.approx(2 * p**2)


def test_saturated_letters() -> None:
    scores = torch.tensor([[0.0, -800.0, -900.0], [-800.0, 0.0, -torch.inf]])
    assert figures(ChoiceCalibration(), scores, torch.tensor([0, 0])) == pytest.approx(
        {"accuracy": 0.5, "ece": 0.5, "ece_equal_mass": 0.5, "brier": 1.0, "log_loss": 400.0}
    )


@pytest.mark.parametrize("kind", [ComparisonCalibration, ChoiceCalibration])
def test_too_few_bins(kind: Any) -> None:
    with pytest.raises(UserError, match="num_bins"):
        kind(1)


def test_a_state_reset_in_inference_mode_takes_updates_outside() -> None:
    metric = ComparisonCalibration()
    with torch.inference_mode():
        metric.update(torch.zeros(2), torch.ones(2))
        metric.reset()
    metric.update(torch.zeros(3), torch.ones(3))
    assert metric.compute().num == 3


def test_states_do_not_grow() -> None:
    metric = ComparisonCalibration()
    sizes = []
    for seed, num in itertools.product(range(2), (1, 500)):
        metric.update(*draws(num, seed))
        sizes.append((metric.cells.shape, metric.totals.shape))
    assert len(set(sizes)) == 1
