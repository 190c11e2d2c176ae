"""How implicit rewards and margins are spread: histograms of fixed size, finest about zero, and sums."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

NUM_CELLS = 4095  # odd: zero, where an untrained margin is, lies in the middle of a cell
SCALE, LIMIT = 0.1, 1e4  # cells are 0.0006 wide about zero, 0.6 % of the value far out; values beyond are clamped
SATURATED = 5.0  # |margin| whose sigmoid is above 0.993: its comparison hardly moves the policy any more


class RewardSpread(NamedTuple):
    """What `RewardHistograms` computes."""

    num: Tensor  # [] comparisons
    figures: dict[
        str, Tensor
    ]  # margins_sd, saturated, accuracy, decided, and means of chosen, rejected and margins; each []
    counts: Tensor  # [3, NUM_CELLS] of chosen rewards, rejected rewards, margins


def histogram_cell(values: Tensor) -> Tensor:
    """Index of the cell that a value is counted in; cells are even in asinh(value / SCALE)."""
    top = float(np.arcsinh(LIMIT / SCALE))
    place = (torch.asinh(values / SCALE) / top + 1) / 2
    return (place * NUM_CELLS).long().clamp(0, NUM_CELLS - 1)


def histogram_edges() -> NDArray[np.float64]:
    """Edges of the cells, [NUM_CELLS + 1], ascending."""
    top = np.arcsinh(LIMIT / SCALE)
    return np.asarray(SCALE * np.sinh(np.linspace(-top, top, NUM_CELLS + 1)))


def quantiles(counts: Tensor, levels: list[float]) -> list[float]:
    """Values below which the given shares of counts [NUM_CELLS] lie; right to a cell's width."""
    cumulative = np.concatenate([[0.0], counts.cpu().numpy().cumsum()])
    used = np.concatenate([[True], cumulative[1:] > cumulative[:-1]])  # a flat stretch has no inverse
    used[:-1] |= used[1:]
    found = np.interp(np.array(levels) * cumulative[-1], cumulative[used], histogram_edges()[used])
    return [float(value) for value in found]


class RewardHistograms(Metric):
    """Chosen and rejected implicit rewards and their margins over comparisons, in states of fixed size."""

    full_state_update = False
    counts: Tensor  # [3, NUM_CELLS]
    totals: Tensor  # [8]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, NUM_CELLS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor, margins: Tensor, decided: Tensor) -> None:
        """Add C comparisons.

        Args:
            chosen: [C] implicit rewards of the preferred responses.
            rejected: [C] of the others.
            margins: [C] chosen over rejected.
            decided: [C] bool, false for a tie, which counts for no accuracy.
        """
        values = torch.stack([chosen, rejected, margins]).to(self.totals)
        ones = torch.ones_like(values)
        # Not in place: a state reset under inference mode takes no update in place outside of it.
        self.counts = self.counts.scatter_add(1, histogram_cell(values), ones)
        margins, decided = values[2], decided.to(self.totals)
        saturated, right = margins.abs() > SATURATED, (margins > 0) * decided
        rows = [*values, ones[0], margins**2, saturated.to(self.totals), right, decided]
        self.totals = self.totals + torch.stack(rows).sum(1)

    def compute(self) -> RewardSpread:
        chosen, rejected, margins, num, squares, saturated, right, decided = self.totals
        mean = margins / num
        figures = {
            "margins_sd": (squares / num - mean**2).clamp(min=0).sqrt(),
            "saturated": saturated / num,
            "accuracy": right / decided.clamp(min=1),
            "decided": decided,
            "chosen": chosen / num,
            "rejected": rejected / num,
            "margins": mean,
        }
        return RewardSpread(num, figures, self.counts)
