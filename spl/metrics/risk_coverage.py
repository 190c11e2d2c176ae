"""Selective prediction: how often a model errs where it answers only what it is surest of.

The risk at a coverage c is the share of errors among the fraction c of most confident answers; the area under that
curve (AURC; Geifman et al. 2019, arXiv 1805.08206) is small where confidence puts right answers before wrong ones.
It sees the order of the confidences alone, so one temperature for all questions moves it little (not at all with two
choices), while calibration error sees their height.
"""

import torch
from torch import Tensor


def selective_risks(confidences: Tensor, correct: Tensor) -> Tensor:
    """Share of errors among the k most confident answers, for k = 1 to N -> [N].

    Equal confidences have no order: each then counts with the mean error of all of them.

    Args:
        confidences: [N]
        correct: [N] 1 where the answer is right, else 0.
    """
    values, index = torch.unique(confidences.double(), return_inverse=True)
    sums = torch.zeros(2, len(values), dtype=torch.double)
    sums.index_add_(1, index, torch.stack([1 - correct.double(), torch.ones_like(confidences, dtype=torch.double)]))
    errors = (sums[0] / sums[1])[index].gather(0, confidences.argsort(descending=True))
    return errors.cumsum(0) / torch.arange(1, len(errors) + 1)


def risk_at(confidences: Tensor, correct: Tensor, coverages: Tensor) -> Tensor:
    """The risk at given coverages in (0, 1] -> as they are; between whole numbers of answers the larger one."""
    risks = selective_risks(confidences, correct)
    last = (coverages.double() * len(risks) - 1e-9).ceil().long() - 1
    return risks[last.clamp(0, len(risks) - 1)]


def area_under_risk(confidences: Tensor, correct: Tensor) -> Tensor:
    """AURC: the mean over k of the risk among the k most confident answers -> []."""
    return selective_risks(confidences, correct).mean()
