"""Selective risk by hand, and equal confidences against all orders of them."""

from itertools import permutations

import pytest
import torch

from spl.metrics.risk_coverage import area_under_risk, risk_at, selective_risks

# Most confident first: right, wrong, right, wrong.
CONFIDENCES, CORRECT = torch.tensor([0.6, 0.9, 0.8, 0.7]), torch.tensor([0.0, 1.0, 0.0, 1.0])


def test_risks_by_hand() -> None:
    risks = [0, 1 / 2, 1 / 3, 1 / 2]
    assert selective_risks(CONFIDENCES, CORRECT).tolist() == pytest.approx(risks)
    assert area_under_risk(CONFIDENCES, CORRECT).item() == pytest.approx(sum(risks) / 4)
    # Of four answers .25 is one, .3 must be two, .75 three.
    found = risk_at(CONFIDENCES, CORRECT, torch.tensor([0.01, 0.25, 0.3, 0.5, 0.75, 1.0]))
    assert found.tolist() == pytest.approx([0, 0, 1 / 2, 1 / 2, 1 / 3, 1 / 2])


def test_only_the_order_of_confidences_counts() -> None:
    torch.testing.assert_close(selective_risks(CONFIDENCES**7, CORRECT), selective_risks(CONFIDENCES, CORRECT))


def test_equal_confidences_are_in_every_order_at_once() -> None:
    confidences, correct = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2]), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    broken = []
    for order in permutations(range(3)):
        apart = confidences.clone()
        apart[1:4] += torch.tensor(order) * 1e-3
        broken.append(selective_risks(apart, correct))
    torch.testing.assert_close(selective_risks(confidences, correct), torch.stack(broken).mean(0))
