"""The closed form against its definition, and gradient descent on the loss against the closed form."""

import math

import pytest
import torch
from torch import Tensor

from spl.objective.loss import spl_loss
from spl.objective.optimum import closed_form_optimum, total_variation, two_outcome_share

STRENGTHS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
PAIRS = torch.combinations(torch.arange(4))
SHARES = STRENGTHS[PAIRS[:, 0]] / STRENGTHS[PAIRS].sum(1)
SETTINGS = [(0.1, 0.1), (0.5, 0.1), (1.0, 0.1), (0.2, 0.5), (1.0, 1.0), (1.0, 0.0), (2.0, 0.3)]


def minimise(logits: Tensor, alpha: float, beta: float, mass_weight: float = 0.0) -> Tensor:
    """Fit a table of logits, of which the first four outcomes are compared; returns all probabilities."""
    logits = logits.clone().requires_grad_()
    descent = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        descent.zero_grad()
        policy_logps = logits.log_softmax(0)[:4]
        loss = spl_loss(policy_logps, REFERENCE.log(), PAIRS, SHARES, alpha, beta, mass_weight=mass_weight).loss
        loss.backward()
        return loss

    descent.step(closure)
    return logits.detach().softmax(0)


def shares_of_listed(probabilities: Tensor) -> Tensor:
    return probabilities[:4] / probabilities[:4].sum()


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_closed_form_is_its_definition(alpha: float, beta: float) -> None:
    """pi_ref^(beta/alpha) exp(r/alpha) / Z with r = log s, in plain arithmetic."""
    weights = [
        q ** (beta / alpha) * s ** (1 / alpha) for q, s in zip(REFERENCE.tolist(), STRENGTHS.tolist(), strict=True)
    ]
    expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    torch.testing.assert_close(closed_form_optimum(REFERENCE.log(), STRENGTHS.log(), alpha, beta), expected)


def test_closed_form_ignores_constants_and_at_beta_0_the_reference() -> None:
    plain = closed_form_optimum(REFERENCE.log(), STRENGTHS.log(), 0.5, 0.1)
    torch.testing.assert_close(closed_form_optimum(REFERENCE.log() - 7, STRENGTHS.log() + 3, 0.5, 0.1), plain)
    absent = torch.full_like(REFERENCE, math.nan)
    torch.testing.assert_close(closed_form_optimum(absent, STRENGTHS.log(), 1.0, 0.0), STRENGTHS)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_gradient_descent_reaches_the_closed_form(alpha: float, beta: float) -> None:
    optimum = closed_form_optimum(REFERENCE.log(), STRENGTHS.log(), alpha, beta)
    start = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    assert total_variation(start.softmax(0), optimum) > 0.1
    assert total_variation(minimise(start, alpha, beta), optimum) < 1e-6


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.5, 0.1), (1.0, 0.1), (1.0, 0.0)])
def test_mass_term_moves_the_mass_and_not_the_shares(alpha: float, beta: float) -> None:
    """Three outcomes that nobody compares start with most of the mass. Only the mass term takes it from them."""
    optimum = closed_form_optimum(REFERENCE.log(), STRENGTHS.log(), alpha, beta)
    start = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, 9.5, 10.0], dtype=torch.float64)
    without, with_term = minimise(start, alpha, beta), minimise(start, alpha, beta, mass_weight=0.1)
    assert total_variation(shares_of_listed(without), optimum) < 1e-6
    assert total_variation(shares_of_listed(with_term), optimum) < 1e-6
    assert without[:4].sum() < 0.5
    assert with_term[:4].sum() > 0.9999


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.8), (0.5, 0.941176), (0.1, 0.999999)])
def test_two_outcomes_with_an_even_reference(alpha: float, share: float) -> None:
    assert two_outcome_share(0.8, 0.5, alpha, 0.1) == pytest.approx(share, abs=5e-7)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_two_outcomes_are_the_closed_form_of_two(alpha: float, beta: float) -> None:
    reference, strengths = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log()
    expected = closed_form_optimum(reference, strengths, alpha, beta)[0].item()
    assert two_outcome_share(0.3, 0.9, alpha, beta) == pytest.approx(expected, rel=1e-9)


def test_two_outcomes_at_the_ends() -> None:
    assert two_outcome_share(1.0, 0.5, 1.0, 0.1) == 1.0
    assert two_outcome_share(0.0, 0.5, 1.0, 0.1) == 0.0
    assert two_outcome_share(0.001, 0.5, 0.001, 0.1) == 0.0  # odds of exp(-6907)
    assert two_outcome_share(0.8, 1.0, 1.0, 0.0) == pytest.approx(0.8)


def test_total_variation() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(total_variation(p, q), torch.tensor([0.3, 1.0]))
