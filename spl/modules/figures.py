"""The figures of preference training: what a step's output says of a batch, each beside the count it is a mean of."""

import torch
import torch.distributed as dist
from torch import Tensor

from spl.types import PreferenceBatch, StepOutput

Figures = dict[str, tuple[Tensor, int]]

MEANS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_per_token",
    "token_entropy",
)


def preference_figures(output: StepOutput, batch: PreferenceBatch) -> Figures:
    """Means over examples (loss), comparisons (margins, rewards, logps), those with a majority (accuracies), tokens.

    The chosen response of a comparison is the one that at least half of the raters prefer. A margin counts as right
    where its sign agrees; a tie has no right answer and is left out.
    """
    first, second = batch.comparisons.unbind(1)
    chosen_first = batch.shares >= 0.5
    sign = torch.where(chosen_first, 1.0, -1.0)
    chosen, rejected = torch.where(chosen_first, first, second), torch.where(chosen_first, second, first)
    decided = batch.shares != 0.5
    num, num_decided = len(batch.shares), int(decided.sum())
    margins, rewards = output["margins"] * sign, output["rewards"]
    logps, tokens = output["policy_logps"], output["num_response_tokens"]
    return {
        "loss": (output["objective"], batch.num_examples),
        "rewards/margins": (margins.mean(), num),
        "rewards/accuracies": (((margins > 0) & decided).sum() / max(num_decided, 1), num_decided),
        "rewards/chosen": (rewards[chosen].mean(), num),
        "rewards/rejected": (rewards[rejected].mean(), num),
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
