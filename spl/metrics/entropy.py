"""Means over samples of several prompts, with their standard errors: of entropies, divergences, lengths.

The quantities themselves come from the laws along the samples (`spl.types.ResponseLaws`): the sum of the next token's
entropies over a reply is, in the mean, the entropy of the whole reply, and so for the cross-entropy.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: Tensor
    error: Tensor


class PromptMean(Metric):
    """Mean over prompts of the means over each prompt's samples, for Q quantities at once.

    The prompts are taken as given, so the standard error is that of drawing other samples of the same prompts: the root
    of the summed variances of the prompts' means, over the number of prompts. It is NaN with one sample a prompt.

    Args:
        num_quantities: Q.
    """

    full_state_update = False
    means: Tensor
    variances: Tensor
    num: Tensor

    def __init__(self, num_quantities: int = 1) -> None:
        super().__init__()
        self.add_state("means", torch.zeros(num_quantities), dist_reduce_fx="sum")
        self.add_state("variances", torch.zeros(num_quantities), dist_reduce_fx="sum")
        self.add_state("num", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take in the N samples of one prompt, [N, Q]."""
        n = len(values)
        # Not in place: a state reset under inference mode takes no update in place outside of it.
        self.means = self.means + values.mean(0)
        self.variances = self.variances + (values.var(0) / n if n > 1 else torch.nan)
        self.num = self.num + 1

    def compute(self) -> Estimate:
        """Mean and standard error, [Q] each."""
        return Estimate(self.means / self.num, self.variances.sqrt() / self.num)
