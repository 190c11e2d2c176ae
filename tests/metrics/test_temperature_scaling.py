"""Temperatures against a grid, against laws whose temperature is known, and against scikit-learn's log-loss."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss as sklearn_log_loss

from spl.metrics.temperature import HIGHEST, LOWEST, answer_law, fit_temperature, match_temperature


def questions(num: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [num, 1, 4], and answers drawn from their law at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(num, 1, 4, generator=generator, dtype=torch.double)
    law = (scores[:, 0] / temperature).softmax(-1)
    return scores, torch.multinomial(law, 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_fit_is_the_best_of_a_grid(temperature: float) -> None:
    scores, answers = questions(300, temperature)
    grid = np.exp(np.linspace(np.log(0.2), np.log(8), 100))
    losses = [sklearn_log_loss(answers, (scores[:, 0] / t).softmax(-1), labels=range(4)) for t in grid]
    best = int(np.argmin(losses))
    found = fit_temperature(scores, answers)
    assert grid[best - 1] < found < grid[best + 1]
    assert found == pytest.approx(temperature, rel=0.35)  # as far as 300 questions tell


def test_a_hopeless_and_a_perfect_model_stop_at_the_ends() -> None:
    scores = torch.tensor([[[5.0, 0.0]], [[5.0, 0.0]]])
    assert fit_temperature(scores, torch.tensor([1, 1])) == pytest.approx(HIGHEST, rel=1e-3)
    assert fit_temperature(scores, torch.tensor([0, 0])) < 2 * LOWEST


def test_the_temperature_between_two_laws_is_found() -> None:
    scores, _ = questions(40, 1.0)
    law = (scores[:, 0] / 1.7).softmax(-1)
    assert match_temperature(scores, law) == pytest.approx(1.7, abs=1e-3)


def test_laws_of_orders_are_averaged_and_missing_ones_left_out() -> None:
    # By hand: (1/4, 3/4) and (1/2, 1/2) have the mean (3/8, 5/8); the second question has one order and two choices.
    nan, inf = torch.nan, torch.inf
    first = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 0.0]]).log()
    second = torch.tensor([[0.0, 0.0, -inf], [nan, nan, nan]])
    found = answer_law(torch.stack([first, second]))
    assert found.tolist() == [pytest.approx([3 / 8, 5 / 8, 0]), pytest.approx([0.5, 0.5, 0])]
    # At temperature 1/2 the first order's odds are squared before the mean: (1/10 + 1/2) / 2.
    assert answer_law(first[None], 0.5)[0].tolist() == pytest.approx([0.3, 0.7, 0])
