"""Shares of the answers against people's: records of every question, of all together and of the groups."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spl.data.opinions import Opinion
from spl.evaluation.choices import Measured, crossed
from spl.evaluation.scaling import AS_IT_IS, estimate
from spl.evaluation.shares import Asking, uniform
from spl.metrics.opinions import jensen_shannon, scale_distance, shares_entropy, total_variation

Record = dict[str, Any]

UNIFORM = "(uniform)"
"""Label of the yardstick, which no model's own label is likely to be."""
MEASURES = (
    *("one_minus_jsd", "one_minus_w1", "total_variation", "entropy", "people_entropy", "entropy_gap"),
    *("mass", "order_gap"),
)
COMPARED = ("one_minus_jsd", "one_minus_w1", "total_variation", "entropy", "mass")
NOTES = (
    "Shares are normalised over the listed answers; the mass is what a policy gives them in all, of which training on "
    "comparisons fixes nothing.",
    "Agreement with people is read against (uniform), every option equally often. one_minus_jsd is to base 2, "
    "entropies are in nats, one_minus_w1 is of questions whose options are a scale.",
    "The worst-off group is found anew in every draw; the smallest of many means lies below the group's true one.",
)


def against_people(
    questions: Sequence[Opinion],
    said: Mapping[str, Sequence[Asking]],
    source: str,
    min_group: int,
    base: str | None,
    draws: int,
    seed: int,
) -> list[Record]:
    """Records of what all policies said to questions with people's answers.

    Args:
        questions: that all were asked.
        said: the answers of each policy's training runs.
        source: what estimates over all questions have as group.
        min_group: questions that a group needs for figures of its own.
        base: the policy that others are compared with.
        draws: of the bootstrap over questions and runs.
        seed: of the bootstrap.
    """
    groups = sorted({group for question in questions for group in question.people})
    records: list[Record] = [{"kind": "note", "text": text} for text in NOTES]
    found: dict[str, dict[str, Measured]] = {}
    for label, runs in {**said, UNIFORM: [uniform(questions)]}.items():
        values = _values(questions, runs, groups)
        records += _items(label, questions, values, groups, source)
        place = {"policy": label, "setting": AS_IT_IS, "group": source}
        # A question's number is the mean over the groups that were asked it.
        overall = {name: value.nanmean(-1) for name, value in values.items()}
        found[label] = {name: _mean(value, draws, seed) for name, value in overall.items() if _known(value).any()}
        records += [estimate(place, name, of) for name, of in found[label].items()]
        records += _by_group(place, values["one_minus_jsd"], groups, min_group, draws, seed)
        if label != UNIFORM:
            records += _shares(label, questions, runs)
    for label, figures in found.items():
        if base and label not in (base, UNIFORM):
            place = {"policy": label, "setting": AS_IT_IS, "group": source}
            names = [name for name in COMPARED if name in figures]
            records += [estimate(place, f"{n}_minus_base", figures[n].minus(found[base][n])) for n in names]
    return records


def _values(questions: Sequence[Opinion], runs: Sequence[Asking], groups: Sequence[str]) -> dict[str, Tensor]:
    """Each measure as [S, N, G], NaN where a group was not asked a question."""
    found = {name: torch.full((len(runs), len(questions), len(groups)), torch.nan).double() for name in MEASURES}
    for s, run in enumerate(runs):
        for n, question in enumerate(questions):
            index = torch.tensor([groups.index(group) for group in question.people])
            for name, value in _compared(question, run).items():
                found[name][s, n, index] = torch.as_tensor(value, dtype=torch.double)
    return found


def _compared(question: Opinion, run: Asking) -> dict[str, Tensor | float]:
    """Measures of one answer law against every group's, [G of the question] or []."""
    people = torch.tensor(list(question.people.values()), dtype=torch.double)
    share, mass, order_gap = run[question.row]
    entropy, theirs = shares_entropy(share), shares_entropy(people)
    return {
        "one_minus_jsd": 1 - jensen_shannon(share, people),
        "one_minus_w1": 1 - scale_distance(share, people) if question.ordered else torch.nan,
        "total_variation": total_variation(share, people),
        "entropy": entropy,
        "people_entropy": theirs,
        "entropy_gap": entropy - theirs,
        "mass": mass,
        "order_gap": order_gap,
    }


def _items(
    label: str, questions: Sequence[Opinion], values: Mapping[str, Tensor], groups: Sequence[str], source: str
) -> Iterator[Record]:
    runs = len(values["mass"])
    for run in range(runs):
        for n, question in enumerate(questions):
            for group in question.people:
                g = groups.index(group)
                yield {
                    "kind": "item",
                    "policy": label,
                    "setting": AS_IT_IS,
                    "train_seed": run if runs > 1 else None,
                    "item": question.item,
                    "group": group or source,
                    "values": {name: float(value[run, n, g]) for name, value in values.items()},
                }


def _shares(label: str, questions: Sequence[Opinion], runs: Sequence[Asking]) -> Iterator[Record]:
    """Of each question, people's and the policy's mean over groups and over runs."""
    for question in questions:
        said = [run[question.row] for run in runs]
        people = torch.tensor(list(question.people.values()), dtype=torch.double)
        yield {
            "kind": "shares",
            "policy": label,
            "item": question.item,
            "question": question.question,
            "options": list(question.options),
            "people": people.mean(0).tolist() if len(people) else None,
            "model": torch.stack([s.share for s in said]).mean(0).tolist(),
            "mass": sum(s.mass for s in said) / len(said),
        }


def _by_group(
    place: Record, values: Tensor, groups: Sequence[str], min_group: int, draws: int, seed: int
) -> Iterator[Record]:
    """Agreement with every group of enough questions, and with the worst-off of them."""
    counts = (~values[0].isnan()).sum(0)
    large = [g for g, count in enumerate(counts.tolist()) if count >= min_group]
    if len(groups) < 2 or not large:
        return
    for g in large:
        yield estimate({**place, "group": groups[g]}, "one_minus_jsd", _mean(values[..., g], draws, seed))
    of_large = values[..., large]
    least = crossed(_least, of_large, draws=draws, seed=seed)
    worst = groups[large[int(of_large.mean(0).nanmean(0).argmin())]]
    yield estimate(place, "worst_group_one_minus_jsd", least) | {"worst_group": worst}


def _least(values: Tensor) -> float:
    """The smallest of the groups' means over questions [N, G]; a group of which a draw has no question has none."""
    means = values.nanmean(0)
    known = means[~means.isnan()]
    return float(known.min()) if len(known) else float("nan")


def _known(values: Tensor) -> Tensor:
    """Which questions have a number, of values [S, N]."""
    return ~values.isnan().any(0)


def _mean(values: Tensor, draws: int, seed: int) -> Measured:
    """Over the questions that have a number, which are the same for all policies."""
    return crossed(lambda of: float(of.mean()), values[:, _known(values)], draws=draws, seed=seed)
