"""What graded replies are worth: for each problem, and then over problems and training runs, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spl.evaluation.grading import RIGHT, Graded, Solution
from spl.intervals import bootstrap, draws_of, interval
from spl.metrics.pass_at_k import chosen_at_k, distinct_at_k, majority_at_k, pass_at_k
from spl.results import Record

Array = NDArray[np.float64]

Rewards = list[list[list[float]]]
"""Of replies: [training runs][problems][replies]."""

CURVES = {
    "pass@k": "problems solved",
    "majority@k": "problems whose most frequent answer is right",
    "reward_chosen@k": "problems whose best-rewarded reply is right",
    "distinct@k": "distinct answers",
}
"""Names to what is on their axis."""


@dataclass
class Measured:
    """The numbers of a policy, decoded in one way.

    Attributes:
        arm: its replies.
        curves: a name of CURVES to values [training runs, problems, k].
        values: names to values [training runs, problems].
    """

    arm: Graded
    curves: dict[str, Array]
    values: dict[str, Array]


def measured(arm: Graded, max_k: int, rewards: Rewards | None = None) -> Measured:
    """Measure each problem by itself.

    Args:
        arm: replies, graded.
        max_k: largest number of replies to choose among.
        rewards: of every reply, if there is a reward model.
    """
    curves: dict[str, list[list[Array]]] = {name: [] for name in CURVES if rewards or name != "reward_chosen@k"}
    values: dict[str, list[list[float]]] = {}
    for run, solutions in enumerate(arm.solutions):
        found = [_curves(s, max_k, rewards[run][k] if rewards else None) for k, s in enumerate(solutions)]
        for name, matrices in curves.items():
            matrices.append([of_problem[name] for of_problem in found])
        own_law = arm.setting == "t 1"
        scalars = [_values(s, of, max_k, own_law) for s, of in zip(solutions, found, strict=True)]
        for name in scalars[0]:
            values.setdefault(name, []).append([of_problem[name] for of_problem in scalars])
    return Measured(
        arm,
        {name: np.asarray(matrices) for name, matrices in curves.items()},
        {name: np.asarray(matrix) for name, matrix in values.items()},
    )


def _curves(solutions: Sequence[Solution], max_k: int, rewards: Sequence[float] | None) -> dict[str, Array]:
    answers = [solution.answer for solution in solutions]
    correct = [solution.correct for solution in solutions]
    curves = {
        "pass@k": pass_at_k(len(solutions), sum(correct), max_k),
        "majority@k": majority_at_k(answers, RIGHT, max_k),
        "distinct@k": distinct_at_k(answers, max_k),
    }
    if rewards is not None:
        curves["reward_chosen@k"] = chosen_at_k(rewards, correct, max_k)
    return curves


def _values(solutions: Sequence[Solution], curves: Mapping[str, Array], max_k: int, own_law: bool) -> dict[str, float]:
    """Numbers of one problem; curves at the k that are told, and what must stand beside them."""
    num, replies = len(solutions), [solution.reply for solution in solutions]
    lengths = [reply.num_tokens for reply in replies if reply.num_tokens is not None]
    logps = [np.nan if reply.logp is None else reply.logp for reply in replies]
    read = sum(solution.answer is not None for solution in solutions)
    values = {name.replace("@k", f"@{k}"): float(curve[k - 1]) for name, curve in curves.items() for k in told(max_k)}
    return values | {
        # Of k replies k * read / num have an answer, of which so many are the first of their kind.
        "repeats": 1 - float(curves["distinct@k"][-1]) / (max_k * read / num) if read else float("nan"),
        "unread": 1 - read / num,
        "surprisal": -float(np.mean(logps)) if own_law else float("nan"),  # else it is no entropy
        "length": float(np.mean(lengths)) if lengths else float("nan"),
        "ended": sum(reply.finish == "stop" for reply in replies) / num,
        "truncation_rate": sum(reply.finish != "stop" for reply in replies) / num,
    }


def told(max_k: int) -> list[int]:
    """Numbers of samples that tables tell: 1, 4, 16, ... and the largest."""
    return [k for k in (4**e for e in range(16)) if k < max_k] + [max_k]


def drawn_at(max_k: int) -> list[int]:
    """Numbers of samples at which curves are drawn: all up to 8, then four to a doubling, and the largest."""
    steps = {round(2 ** (e / 4)) for e in range(64)}
    return sorted({k for k in steps if k < max_k} | {max_k})


def item_records(found: Measured, items: Sequence[str], groups: Mapping[str, str]) -> Iterator[Record]:
    """One record a problem and training run."""
    for run, train_seed in enumerate(found.arm.train_seeds):
        for k, item in enumerate(items):
            values = {name: float(matrix[run, k]) for name, matrix in found.values.items()}
            replies = found.arm.solutions[run][k]
            counted = {"samples": len(replies), "correct": sum(solution.correct for solution in replies)}
            yield {
                "kind": "item",
                **_arm(found.arm),
                "train_seed": train_seed,
                "item": item,
                "group": groups.get(item),
                "values": counted | values,
            }


def _arm(arm: Graded) -> Record:
    return {"policy": arm.policy, "setting": arm.setting}


@dataclass(frozen=True)
class Bootstrap:
    """How intervals come about: problems and training runs are drawn again, the same problems for every policy."""

    draws: int = 2000
    seed: int = 0

    def estimate(self, arm: Graded, name: str, group: str | None, values: Array, **more: Any) -> Record:
        """The mean of values [training runs, problems]."""
        found = bootstrap(values, self.draws, self.seed)._asdict()
        return {"kind": "estimate", **_arm(arm), "train_seed": None, "name": name, "group": group} | found | more

    def estimates(self, found: Measured, group: str | None, chosen: Sequence[int]) -> Iterator[Record]:
        """The mean of every measure over the chosen problems."""
        for name, matrix in found.values.items():
            if np.isfinite(matrix[:, chosen]).any():
                yield self.estimate(found.arm, name, group, matrix[:, chosen])

    def curve_records(self, found: Measured, group: str | None, chosen: Sequence[int]) -> Iterator[Record]:
        """Every curve over the chosen problems, with bands that hold at each k by itself."""
        for name, axis in CURVES.items():
            if name not in found.curves:
                continue
            at = drawn_at(found.curves[name].shape[2])
            values = found.curves[name][:, chosen][:, :, [k - 1 for k in at]]
            means, drawn = values.mean((0, 1)), draws_of(values, self.draws, self.seed)
            bands = [interval(float(mean), drawn[:, k], len(chosen)) for k, mean in enumerate(means)]
            yield {
                "kind": "curve",
                **_arm(found.arm),
                "train_seed": None,
                "name": name,
                "group": group,
                "x": at,
                "y": [band.value for band in bands],
                "low": [band.low for band in bands],
                "high": [band.high for band in bands],
                "weight": None,
                "x_name": "samples",
                "y_name": axis,
            }

    def against(self, found: Measured, rival: Measured, group: str | None, chosen: Sequence[int]) -> Iterator[Record]:
        """Paired differences to a rival, and the samples that are needed to solve as much as all of the rival's."""
        for name, matrix in found.values.items():
            theirs = rival.values.get(name)
            if "@" in name and theirs is not None:
                drawn = draws_of(matrix[:, chosen], self.draws, self.seed)
                drawn = drawn - draws_of(theirs[:, chosen], self.draws, self.seed)
                value = float(matrix[:, chosen].mean() - theirs[:, chosen].mean())
                yield {
                    "kind": "estimate",
                    **_arm(found.arm),
                    "train_seed": None,
                    "name": f"{name}_difference",
                    "group": group,
                    "rival": rival.arm.label,
                } | interval(value, drawn, len(chosen))._asdict()
        if rival.curves["pass@k"][:, chosen, -1].any():  # nothing matches nothing
            yield self._samples_to_match(found, rival, group, chosen)

    def _samples_to_match(self, found: Measured, rival: Measured, group: str | None, chosen: Sequence[int]) -> Record:
        """The least k at which pass@k reaches the rival's pass@N; null for a value or an end that k <= N never reaches.

        `reached` is the share of draws in which it is reached.
        """
        ours, theirs = found.curves["pass@k"][:, chosen], rival.curves["pass@k"][:, chosen]
        value = first_reached(ours.mean((0, 1))[None], theirs[..., -1].mean()[None])
        drawn = first_reached(draws_of(ours, self.draws, self.seed), draws_of(theirs[..., -1], self.draws, self.seed))
        # Whole numbers of samples, some of them infinite, between which nothing may be interpolated.
        low, high = float(np.quantile(drawn, 0.025, method="lower")), float(np.quantile(drawn, 0.975, method="higher"))
        if len(chosen) < 2:
            low = high = float("nan")
        return {
            "kind": "estimate",
            **_arm(found.arm),
            "train_seed": None,
            "name": "samples_to_match",
            "group": group,
            "rival": rival.arm.label,
            "of": ours.shape[2],
            "value": value[0],
            "low": low,
            "high": high,
            "num": len(chosen),
            "reached": float(np.isfinite(drawn).mean()),
        }


def first_reached(curves: Array, targets: Array) -> Array:
    """The least k at which each curve [n, k], k from 1, reaches its target [n] -> [n]; infinity where none does."""
    reached = curves >= targets[:, None] - 1e-12  # a policy matches itself, whatever the rounding
    return np.where(reached.any(1), reached.argmax(1) + 1.0, np.inf)
