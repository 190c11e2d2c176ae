"""Post-hoc temperature scaling (Guo et al. 2017, arXiv 1706.04599): the baseline of every claim about calibration.

One number, fitted on questions that nothing else is measured on, divides all log-probabilities. Where a letter and its
end are the whole reply, SPL's answer law is DPO's at the temperature alpha / beta, so that what SPL does to calibration
a temperature could do afterwards.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.05, 100.0
"""Ends of the temperatures that are searched; past them an answer law is as good as certain or uniform."""


def answer_law(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities of K answers, the mean over the orders in which they were shown -> [N, K].

    Args:
        scores: [N, orders, K] log-probabilities up to a constant of the question and order; -inf where it has fewer
            answers, a row of NaN where fewer orders.
        temperature: divides them, before the mean is taken.
    """
    return (scores.double() / temperature).softmax(-1).nanmean(1)


def fit_temperature(scores: Tensor, answers: Tensor) -> float:
    """The temperature of least log-loss, between LOWEST and HIGHEST.

    Args:
        scores: [N, orders, K] as in `answer_law`.
        answers: [N] indices of the right ones.
    """
    rows = torch.arange(len(answers))

    def loss(temperature: float) -> float:
        right = answer_law(scores, temperature)[rows, answers]
        return float(-right.clamp(min=torch.finfo(right.dtype).tiny).log().mean())

    return _least(loss)


def match_temperature(scores: Tensor, law: Tensor) -> float:
    """The temperature at which the scores' law [N, orders, K] comes closest to another [N, K], by the mean KL of it."""

    def divergence(temperature: float) -> float:
        ours = answer_law(scores, temperature).clamp(min=torch.finfo(torch.double).tiny)
        return float((torch.xlogy(law, law) - torch.xlogy(law, ours)).sum(-1).mean())

    return _least(divergence)


def _least(loss: Callable[[float], float]) -> float:
    """Searched on the logarithm, on which temperatures are even."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_temperature: loss(math.exp(log_temperature)),
        bounds=(math.log(LOWEST), math.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return math.exp(float(found.x))
