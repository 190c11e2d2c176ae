"""A policy's shares of the answers to closed questions, averaged over the orders in which options are shown."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spl.data.opinions import Opinion, Presentation
from spl.data.orders import orders_of
from spl.data.tokenization import Encoder, TooLongError
from spl.evaluation.listed import listed_logps
from spl.evaluation.policies import EvaluatedPolicy
from spl.metrics.opinions import total_variation

Asking = Mapping[str, "Said"]
"""What a training run said to every question that fitted, by the question's row."""


class Said(NamedTuple):
    """A policy's answer law to a question."""

    share: Tensor  # [K] the mean over orders of the law normalised over the options
    mass: float  # the mean over orders of the options' probability in all
    order_gap: float  # mean total variation between one order's law and their mean; nan of one order


def average(logps: Tensor) -> Said:
    """Log-probabilities of the options in each order, [orders, K] in the options' own order, to one law."""
    laws = logps.double().softmax(-1)
    share = laws.mean(0)
    gap = float(total_variation(laws, share).mean()) if len(laws) > 1 else torch.nan
    return Said(share, float(logps.double().exp().sum(-1).mean()), gap)


def ask_shares(
    policy: EvaluatedPolicy,
    encoder: Encoder,
    opinions: Sequence[Opinion],
    presentation: Presentation,
    orders: int,
    seed: int,
    max_tokens: int,
    label: str,
) -> dict[str, Said]:
    """Ask every question that fits in the encoder's max_length, in all its orders.

    Args:
        policy: to ask.
        encoder: tokenises; an answer ends with EOS, as sampled ones do.
        opinions: the questions.
        presentation: how options are shown.
        orders: as `orders_of` takes it; where options are not listed there is one.
        seed: of the orders, together with a question's row.
        max_tokens: of a batch.
        label: what to call the policy while it works.
    """
    examples, counts = [], {}
    for opinion in opinions:
        most = 1 if presentation == "unlisted" else orders
        shown = orders_of(len(opinion.options), most, (seed, *opinion.row.encode()))
        try:
            examples += [opinion.encode(encoder, presentation, order) for order in shown]
        except TooLongError:
            continue
        counts[opinion.row] = len(shown)
    logps = iter(listed_logps(policy, examples, max_tokens, label))
    return {row: average(torch.stack([next(logps) for _ in range(count)])) for row, count in counts.items()}


def uniform(opinions: Sequence[Opinion]) -> dict[str, Said]:
    """What saying every option equally often would be: the yardstick of all agreement with people."""
    laws = {o.row: torch.full((len(o.options),), 1 / len(o.options), dtype=torch.double) for o in opinions}
    return {row: Said(law, torch.nan, torch.nan) for row, law in laws.items()}
