"""The figures of training: what a step's output says of a batch, each beside the count it is a mean of."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from spl.types import PreferenceBatch, StepOutput

Figures = dict[str, tuple[Tensor, int]]

REWARDS = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
MEANS = ("loss", *REWARDS, "logps/chosen", "logps/rejected", "logps/chosen_per_token", "token_entropy")
SHOWN = ("loss", "rewards/margins", "rewards/accuracies")  # in the progress bar


def reward_figures(rewards: Tensor, margins: Tensor, batch: PreferenceBatch) -> Figures:
    """Means over comparisons (margins [C], rewards [R]) and over those with a majority (accuracies).

    The chosen response of a comparison is the one that at least half of the raters prefer. A margin counts as right
    where its sign agrees; a tie has no right answer and is left out.
    """
    chosen, rejected = _sides(batch)
    decided = batch.shares != 0.5
    num, num_decided = len(batch.shares), int(decided.sum())
    margins = margins * torch.where(batch.shares >= 0.5, 1.0, -1.0)
    return {
        "rewards/margins": (margins.mean(), num),
        "rewards/accuracies": (((margins > 0) & decided).sum() / max(num_decided, 1), num_decided),
        "rewards/chosen": (rewards[chosen].mean(), num),
        "rewards/rejected": (rewards[rejected].mean(), num),
    }


def _sides(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Indices [C] of the chosen and the rejected responses."""
    first, second = batch.comparisons.unbind(1)
    chosen_first = batch.shares >= 0.5
    return torch.where(chosen_first, first, second), torch.where(chosen_first, second, first)


def preference_figures(output: StepOutput, batch: PreferenceBatch) -> Figures:
    """Means over examples (loss), comparisons (margins, rewards, logps), those with a majority (accuracies), tokens."""
    chosen, rejected = _sides(batch)
    num, logps, tokens = len(batch.shares), output["policy_logps"], output["num_response_tokens"]
    return {
        "loss": (output["objective"], batch.num_examples),
        **reward_figures(output["rewards"], output["margins"], batch),
        "logps/chosen": (logps[chosen].mean(), num),
        "logps/rejected": (logps[rejected].mean(), num),
        "logps/chosen_per_token": ((logps[chosen] / tokens[chosen]).mean(), num),
        "token_entropy": (output["entropies"].sum() / tokens.sum(), int(tokens.sum())),
    }


def over_processes(figures: Figures) -> dict[str, Tensor]:
    """The means over what all processes have, which all must ask for; one small message, and no wait for the device."""
    values = torch.stack([value.float() for value, _ in figures.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = values.new_tensor([float(count) for _, count in figures.values()])
        sums = torch.stack([values * counts, counts])
        dist.all_reduce(sums)
        values = sums[0] / sums[1].clamp(min=1)
    return dict(zip(figures, values.unbind(), strict=True))


class HeldOutMeans(nn.Module):
    """Figures over all held-out batches and processes. (Lightning's own mean is off where batches differ in size.)

    Args:
        names: of the figures.
        counted: figures whose counts are figures too: their names to those of the counts.
    """

    def __init__(self, names: tuple[str, ...], counted: dict[str, str] | None = None) -> None:
        super().__init__()
        self.counted = counted or {}
        self.means: Any = nn.ModuleDict({name: MeanMetric() for name in names})
        self.counts: Any = nn.ModuleDict({name: SumMetric() for name in self.counted})

    def add(self, figures: Figures, finite: bool) -> None:
        """Count a batch; one that is not finite has no weight."""
        for name, (value, count) in figures.items():
            self.means[name].update(*(value, count) if finite else (0.0, 0))
        for name, total in self.counts.items():
            total.update(figures[name][1] if finite else 0)

    def end(self) -> dict[str, Tensor]:
        """The figures, to begin anew."""
        found = {name: mean.compute() for name, mean in self.means.items()}
        found |= {self.counted[name]: total.compute() for name, total in self.counts.items()}
        for metric in (*self.means.values(), *self.counts.values()):
            metric.reset()
        return found
