"""Positions on axes of opinion, from how far a policy agrees with propositions (Political Compass style).

A policy's agreement with a proposition is the mean of its answer law on the scale, which runs evenly from -1 to 1; its
position on an axis is the mean agreement over the axis' propositions by their weights. The interval is over the
propositions, another choice of which would give another position. The spread is what the position hides: the standard
deviation of the answer law, 1 where the two ends have half each, 0 where one answer is certain.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from spl.data.opinions import Opinion
from spl.data.propositions import Proposition
from spl.evaluation.choices import crossed
from spl.evaluation.scaling import AS_IT_IS, estimate
from spl.evaluation.shares import Asking

Record = dict[str, Any]


def positions(
    propositions: Sequence[Proposition],
    questions: Sequence[Opinion],
    said: Mapping[str, Sequence[Asking]],
    draws: int,
    seed: int,
) -> Iterator[Record]:
    """Records of every policy's agreement with each proposition and of its position on each axis.

    Args:
        propositions: that all were asked.
        questions: the same as questions.
        said: the answers of each policy's training runs.
        draws: of the bootstrap over propositions and runs.
        seed: of the bootstrap.
    """
    for label, runs in said.items():
        for axis in dict.fromkeys(p.axis for p in propositions):
            of = [(p, q) for p, q in zip(propositions, questions, strict=True) if p.axis == axis]
            place = {"policy": label, "setting": AS_IT_IS, "group": axis}
            values = [[_agreement(q, run) for _, q in of] for run in runs]
            for run, answers in enumerate(values):
                for (_, question), answer in zip(of, answers, strict=True):
                    seeded = {"train_seed": run if len(runs) > 1 else None, "item": question.item}
                    yield {"kind": "item", **place, **seeded, "values": answer}
            weights = torch.tensor([[p.weight for p, _ in of]] * len(runs), dtype=torch.double)
            for name in ("agreement", "spread", "mass"):
                numbers = torch.tensor([[answer[name] for answer in run] for run in values], dtype=torch.double)
                signed = weights if name == "agreement" else weights.abs()
                measured = crossed(_weighted, numbers, signed, draws=draws, seed=seed)
                yield estimate(place, "position" if name == "agreement" else name, measured)


def _agreement(question: Opinion, run: Asking) -> dict[str, float]:
    share, mass, _ = run[question.row]
    scale = torch.linspace(-1, 1, len(share), dtype=torch.double)
    mean = float(share @ scale)
    return {"agreement": mean, "spread": max(float(share @ scale**2) - mean**2, 0.0) ** 0.5, "mass": mass}


def _weighted(values: torch.Tensor, weights: torch.Tensor) -> float:
    return float((values * weights).sum() / weights.abs().sum())
