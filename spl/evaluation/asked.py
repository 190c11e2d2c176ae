"""What policies said to the same multiple-choice questions, wherever it comes from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spl.data.parsed import item_of
from spl.evaluation.choices import Answers
from spl.metrics.temperature import answer_law
from spl.types import UserError

log = logging.getLogger(__name__)

Scores = Mapping[str, Tensor]
"""A question's row to the log-probabilities of its answers in each order they were shown in, [orders, K]."""


@dataclass(frozen=True)
class Asked:
    """What the training runs of a policy said to N questions.

    Attributes:
        items: [N] ids of the questions.
        answers: [N] indices of the right ones.
        scores: [S, N, orders, K] log-probabilities, as `answer_law` takes them for each of S runs.
    """

    items: list[str]
    answers: Tensor
    scores: Tensor

    def at(self, temperatures: Sequence[float]) -> "Answers":
        """With each run's log-probabilities divided by a temperature of its own."""
        laws = [answer_law(scores, t) for scores, t in zip(self.scores, temperatures, strict=True)]
        mass = self.scores.double().exp().sum(-1).nanmean(-1)
        return Answers(self.items, self.answers, torch.stack(laws), mass)

    def only(self, index: Sequence[int]) -> "Asked":
        """Of some of the questions."""
        return Asked([self.items[k] for k in index], self.answers[list(index)], self.scores[:, list(index)])


def collect(answers: Mapping[str, int], said: Mapping[str, Sequence[Scores]]) -> dict[str, Asked]:
    """What the training runs of every policy said to the questions that all of them were asked.

    Args:
        answers: a question's row to the index of its right answer.
        said: by policy, of each run.

    Raises:
        UserError: there are fewer than two.
    """
    common = [row for row in answers if all(row in run for runs in said.values() for run in runs)]
    if left := len(answers) - len(common):
        log.warning("%d of %d questions were not put to all and are left out.", left, len(answers))
    if len(common) < 2:
        raise UserError("fewer than two questions were put to all: raise max_length or num_questions.")
    items, right = [item_of(row) for row in common], torch.tensor([answers[row] for row in common])
    return {
        label: Asked(items, right, torch.stack([_padded([run[row] for row in common]) for run in runs]))
        for label, runs in said.items()
    }


def _padded(scores: Sequence[Tensor]) -> Tensor:
    """Scores [orders, K] of questions -> [N, most orders, most K], as `answer_law` takes them."""
    orders, choices = (max(score.shape[axis] for score in scores) for axis in (0, 1))
    found = torch.full((len(scores), orders, choices), torch.nan, dtype=torch.double)
    for row, score in zip(found, scores, strict=True):
        row[: len(score)] = -torch.inf
        row[: len(score), : score.shape[1]] = score
    return found


def split(asked: Mapping[str, Asked], share: float, seed: int, name: str) -> tuple[dict[str, Asked], dict[str, Asked]]:
    """The questions that temperatures are fitted on, and those that are measured; the same for all policies.

    Raises:
        UserError: one of the two would be empty.
    """
    num = len(next(iter(asked.values())).items)
    order = np.random.default_rng((seed, 3)).permutation(num).tolist()
    count = round(share * num)
    if not 0 < count < num:
        raise UserError(f"{name}: of {num} questions, the share fit {share:g} leaves none on one side.")
    held, kept = sorted(order[:count]), sorted(order[count:])
    return {k: a.only(held) for k, a in asked.items()}, {k: a.only(kept) for k, a in asked.items()}
