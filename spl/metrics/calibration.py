"""Do stated probabilities come true: calibration error, Brier score, log-loss, reliability diagrams.

All of it is over sums in cells or bins: a tensor [3, N] whose rows are, for each of N, the weight of the predictions
in it, the weighted sum of the predicted probabilities and that of the labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot
from torchmetrics import Metric

from spl.types import UserError

# Odd, so that with an odd number of bins 1/2, about which all untrained margins lie, is in the middle of a cell.
CELLS_A_BIN = 1023


class Calibration(NamedTuple):
    """What a calibration metric computes."""

    num: Tensor  # [] comparisons or questions
    figures: dict[str, Tensor]  # by name, each []
    bins: Tensor  # [3, num_bins] sums in equal-width bins: the reliability diagram


def equal_mass_bins(sums: Tensor, num_bins: int) -> Tensor:
    """Sums in bins of exactly equal weight -> [3, num_bins].

    A cell that a boundary falls into is split: each part has its share of the weight and the cell's own means. So equal
    predictions, which have no order among them, are never put in one.

    Args:
        sums: [3, N] sums in cells of ascending predictions.
        num_bins: how many.
    """
    start = sums.new_zeros(3, 1)
    cumulative = torch.cat([start, sums.cumsum(1)], 1)
    weight = cumulative[0].contiguous()
    edges = weight[-1] * torch.arange(1, num_bins, dtype=sums.dtype, device=sums.device) / num_bins
    cell = (torch.searchsorted(weight, edges, right=True) - 1).clamp(max=sums.shape[1] - 1)
    part = (edges - weight[cell]) / sums[0, cell].clamp(min=torch.finfo(sums.dtype).tiny)
    inner = cumulative[:, cell] + part * sums[:, cell]
    edge_sums = torch.cat([start, inner, cumulative[:, -1:]], 1)
    return edge_sums[:, 1:] - edge_sums[:, :-1]


def calibration_error(bins: Tensor) -> Tensor:
    """Mean over the weight of |mean prediction - mean label| of its bin, from sums in bins [3, B] -> [], in [0, 1]."""
    weight, predictions, labels = bins
    error: Tensor = (predictions - labels).abs().sum() / weight.sum()
    return error


def expected_calibration_error(
    predictions: Tensor,
    labels: Tensor,
    num_bins: int = 15,
    *,
    equal_mass: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599) -> [], in [0, 1].

    Args:
        predictions: [N] probabilities.
        labels: [N] 0 or 1, or the share in [0, 1] of those who say 1.
        num_bins: how many bins.
        equal_mass: bins of equal weight (Nixon et al. 2019, arXiv 1904.01685); else of equal width, [k/B, (k+1)/B).
        weights: [N], 1 each where not given.
    """
    return calibration_error(reliability_bins(predictions, labels, num_bins, equal_mass=equal_mass, weights=weights))


def reliability_bins(
    predictions: Tensor,
    labels: Tensor,
    num_bins: int = 15,
    *,
    equal_mass: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Sums in bins -> [3, num_bins], of arguments as `expected_calibration_error` takes them."""
    values, labels = predictions.double(), labels.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    if equal_mass:
        unique, index = torch.unique(values, return_inverse=True)
        return equal_mass_bins(_sums(values, labels, weights, index, len(unique)), num_bins)
    return _sums(values, labels, weights, _bin(values, num_bins), num_bins)


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """E_y sum_k (p_k - 1[y = k])^2 with y drawn from the labels -> [...], in [0, 2].

    Twice the usual score of a binary prediction: 2 [s (1 - p)^2 + (1 - s) p^2] where a share s of raters say 1.

    Args:
        probabilities: [..., K] summing to 1.
        labels: [..., K] one-hot, or the shares of raters for each.
    """
    return ((probabilities - labels) ** 2 + labels * (1 - labels)).sum(-1)


def log_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """-sum_k label_k log p_k in nats -> [...]; a class that nobody chose adds nothing, whatever its probability.

    Args:
        log_probabilities: [..., K]
        labels: [..., K] one-hot, or the shares of raters for each.
    """
    return -torch.where(labels > 0, labels * log_probabilities, 0).sum(-1)


def _bin(predictions: Tensor, num_bins: int) -> Tensor:
    return (predictions * num_bins).long().clamp(0, num_bins - 1)


def _cell(predictions: Tensor, num_bins: int) -> Tensor:
    """Within the prediction's bin, so that rounding never puts it in another bin's cell."""
    index = _bin(predictions, num_bins)
    return index * CELLS_A_BIN + _bin(predictions * num_bins - index, CELLS_A_BIN)


def _sums(predictions: Tensor, labels: Tensor, weights: Tensor, index: Tensor, num: int) -> Tensor:
    values = torch.stack([weights, weights * predictions, weights * labels])
    return values.new_zeros(3, num).index_add_(1, index, values)


class CalibrationMetric(Metric):
    """Sums of fixed size that everything about calibration is computed from.

    Predictions are counted in cells of [0, 1], 1023 a bin. Equal-width bins are whole cells, so they are exact;
    equal-mass bins treat predictions of one cell, less than 1e-4 apart, as one.

    Args:
        num_bins: bins of the calibration errors and of the reliability diagram.

    Raises:
        UserError: fewer than two bins.
    """

    full_state_update = False
    cells: Tensor  # [3, num_bins * CELLS_A_BIN]
    totals: Tensor  # [num_totals]

    def __init__(self, num_bins: int, num_totals: int) -> None:
        super().__init__()
        if num_bins < 2:
            raise UserError(f"num_bins must be 2 or more, but is {num_bins}: 15 is the usual number.")
        self.num_bins = num_bins
        cells = torch.zeros(3, num_bins * CELLS_A_BIN, dtype=torch.float64)
        self.add_state("cells", cells, dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(num_totals, dtype=torch.float64), dist_reduce_fx="sum")

    def count(self, predictions: Tensor, labels: Tensor, weight: float) -> None:
        """Add predictions [N] and labels [N], all with the same weight, to the cells."""
        # Not in place, here and below: a state reset under inference mode takes no update in place outside of it.
        weights, index = torch.full_like(labels, weight), _cell(predictions, self.num_bins)
        self.cells = self.cells + _sums(predictions, labels, weights, index, self.cells.shape[1])

    def bins(self) -> Tensor:
        """Sums in equal-width bins, [3, num_bins]."""
        return self.cells.view(3, self.num_bins, CELLS_A_BIN).sum(2)

    def errors(self) -> dict[str, Tensor]:
        """Both calibration errors."""
        return {
            "ece": calibration_error(self.bins()),
            "ece_equal_mass": calibration_error(equal_mass_bins(self.cells, self.num_bins)),
        }


class ComparisonCalibration(CalibrationMetric):
    """Calibration of the probability that the first response of a comparison is preferred.

    Which response stands first says nothing: in ordinary pairs it is always the chosen one, so that every label would
    be 1. Each comparison therefore counts in both directions, (p, share) and (1 - p, 1 - share), with half a weight
    each; the reliability diagram is symmetric about (1/2, 1/2), and the correlation is taken about 1/2.

    Figures: `ece`, `ece_equal_mass`, `brier` in [0, 2], `log_loss` in nats; where some share is not 0, 1/2 or 1 also
    `share_gap`, the mean of |p - share|, and `share_correlation`, Pearson's (0 where all p are 1/2).
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__(num_bins, 8)

    def update(self, logits: Tensor, shares: Tensor) -> None:
        """Add C comparisons.

        Args:
            logits: [C] log-odds that the first response is preferred.
            shares: [C] of raters who prefer it.
        """
        logits, shares = logits.to(self.totals), shares.to(self.totals)
        log_probabilities = logsigmoid(torch.stack([logits, -logits], -1))
        probabilities, labels = log_probabilities.exp(), torch.stack([shares, 1 - shares], -1)
        self.count(probabilities.flatten(), labels.flatten(), 0.5)
        p, s = probabilities[:, 0] - 0.5, shares - 0.5
        soft = (shares != 0) & (shares != 0.5) & (shares != 1)
        brier, loss = brier_score(probabilities, labels), log_loss(log_probabilities, labels)
        values = [torch.ones_like(p), brier, loss, soft, (p - s).abs(), p * p, s * s, p * s]
        self.totals = self.totals + torch.stack([v.to(self.totals) for v in values]).sum(1)

    def compute(self) -> Calibration:
        num, brier, loss, soft, gap, pp, ss, ps = self.totals
        figures = self.errors() | {"brier": brier / num, "log_loss": loss / num}
        if soft > 0:
            figures["share_gap"] = gap / num
            figures["share_correlation"] = ps / (pp * ss).sqrt().clamp(min=torch.finfo(pp.dtype).tiny)
        return Calibration(num, figures, self.bins())


class ChoiceCalibration(CalibrationMetric):
    """Calibration of a choice among K answers, which may differ in number from question to question.

    Figures: `accuracy` of the most probable answer (the first of equals), `ece` and `ece_equal_mass` of its
    probability, `brier` over all answers, in [0, 2], `log_loss` in nats.
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__(num_bins, 4)

    def update(self, scores: Tensor, answers: Tensor) -> None:
        """Add N questions.

        Args:
            scores: [N, K] log-probabilities up to a constant of the question; -inf where it has fewer answers.
            answers: [N] indices of the right ones.
        """
        if not len(answers):
            return
        log_probabilities = scores.to(self.totals).log_softmax(-1)
        probabilities, answers = log_probabilities.exp(), answers.to(self.cells.device)
        labels = one_hot(answers, scores.shape[1]).to(self.totals)
        confidence, choice = probabilities.max(-1)
        right = (choice == answers).to(self.totals)
        self.count(confidence, right, 1.0)
        brier, loss = brier_score(probabilities, labels), log_loss(log_probabilities, labels)
        self.totals = self.totals + torch.stack([torch.ones_like(right), right, brier, loss]).sum(1)

    def compute(self) -> Calibration:
        num, right, brier, loss = self.totals
        figures = {"accuracy": right / num} | self.errors() | {"brier": brier / num, "log_loss": loss / num}
        return Calibration(num, figures, self.bins())
