"""Implicit rewards and margins against numbers worked out by hand."""

import math

import torch

from spl.objective.reward import implicit_reward, margins

POLICY = torch.tensor([-1.0, -3.0, -6.0], dtype=torch.float64)
REFERENCE = torch.tensor([-2.0, -2.5, -4.0], dtype=torch.float64)
ABSENT = torch.full_like(REFERENCE, math.nan)


def test_implicit_reward() -> None:
    expected = torch.tensor([-0.5 + 0.2, -1.5 + 0.25, -3.0 + 0.4], dtype=torch.float64)
    torch.testing.assert_close(implicit_reward(POLICY, REFERENCE, 0.5, 0.1), expected)


def test_margins() -> None:
    comparisons = torch.tensor([[0, 2], [1, 0]])
    expected = torch.tensor([0.5 * 5 - 0.1 * 2, 0.5 * -2 - 0.1 * -0.5], dtype=torch.float64)
    torch.testing.assert_close(margins(POLICY, REFERENCE, comparisons, 0.5, 0.1), expected)


def test_margins_take_an_alpha_for_each_comparison() -> None:
    comparisons = torch.tensor([[0, 2], [1, 0]])
    alpha = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = torch.tensor([0.5 * 5 - 0.1 * 2, 2.0 * -2 - 0.1 * -0.5], dtype=torch.float64)
    torch.testing.assert_close(margins(POLICY, REFERENCE, comparisons, alpha, 0.1), expected)


def test_a_margin_is_the_difference_of_rewards() -> None:
    comparisons = torch.tensor([[0, 1], [2, 1], [2, 0]])
    rewards = implicit_reward(POLICY, REFERENCE, 0.3, 0.2)
    difference = rewards[comparisons[:, 0]] - rewards[comparisons[:, 1]]
    torch.testing.assert_close(margins(POLICY, REFERENCE, comparisons, 0.3, 0.2), difference)


def test_without_beta_the_reference_is_not_looked_at() -> None:
    torch.testing.assert_close(implicit_reward(POLICY, ABSENT, 0.5, 0.0), 0.5 * POLICY)
    torch.testing.assert_close(
        margins(POLICY, ABSENT, torch.tensor([[0, 1]]), 0.5, 0.0), torch.tensor([1.0], dtype=torch.float64)
    )


def test_a_small_difference_of_long_responses_survives_float32() -> None:
    """Scaling before subtracting would round -3000 * .1 and -3000.001 * .1 apart from each other."""
    policy = torch.tensor([-3000.0, -3000.0 - 2**-10])
    margin = margins(policy, torch.zeros(2), torch.tensor([[0, 1]]), 0.1, 0.1)
    assert margin.item() == torch.tensor(0.1).item() * 2**-10
