"""Diversity against quality: the front of each family of policies, its area, and how families compare, with intervals.

A family is a policy's arms that a user chooses among: SPL at several alpha/beta, or DPO at several temperatures. Both
axes are scaled to the worst and best mean of all arms, so areas are shares of that box, whose size depends on which
arms are there. Prompts (and training seeds) are drawn again, the same for all arms, so that comparisons are paired. A
front is chosen on the data that it is drawn on: with few prompts it leans to what was lucky, for all families alike.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spl.intervals import draws_of, interval
from spl.results import Record

Array = NDArray[np.float64]

_OWN_LAW = ("", "t 1")
_GRID = np.linspace(0.0, 1.0, 33)
_KINDS = {"t": "temperature", "global": "global temperature"}


class Arm(NamedTuple):
    """A policy as it was decoded."""

    policy: str
    setting: str


class Cloud(NamedTuple):
    """The points of a family, scaled so that 0 is the worst and 1 the best mean of all arms; row 0 holds the means."""

    x: Array  # [1 + draws, arms]
    y: Array  # [1 + draws, arms]


def families_of(arms: Iterable[Arm], named: Mapping[str, str] | None = None) -> dict[str, list[Arm]]:
    """Families of arms: "dpo + temperature" has DPO's own law and all its temperatures, "spl" all of SPL's own laws.

    Args:
        arms: all there are.
        named: a policy to its family; else the first word of its label.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault((named or {}).get(arm.policy, arm.policy.split(" ")[0]), []).append(arm)
    families: dict[str, list[Arm]] = {}
    for group, members in groups.items():
        own = [arm for arm in members if arm.setting in _OWN_LAW]
        kinds: dict[str, list[Arm]] = {}
        for arm in members:
            if arm not in own:
                kinds.setdefault(_kind(arm.setting), []).append(arm)
        if len(own) > 1 or not kinds:
            families[group] = own
        families |= {f"{group} + {kind}": [*own, *others] for kind, others in kinds.items()}
    return families


def _kind(setting: str) -> str:
    """A way of decoding without its numbers: "temperature" of "t 1.2", "temperature, top_p" of "t 1.2 top_p 0.9"."""
    words = re.findall(r"[a-z_]+", setting)
    return ", ".join(_KINDS.get(word, word) for word in words) or setting


def front_records(
    values: Mapping[str, Mapping[Arm, Array]],
    families: Mapping[str, Sequence[Arm]],
    diversity: Mapping[str, int],
    quality: Mapping[str, int],
    draws: int,
    seed: int,
) -> list[Record]:
    """Curves and estimates of every pair of a measure of diversity and one of quality.

    Records bear a family's name as `policy` and "diversity / quality" as `group`:

    - curve `front`: the best quality at each level of diversity or better; null where no arm of the family is there.
      Its band counts a draw in which none is there as the worst quality.
    - estimate `hypervolume`: share of the box that the front dominates.
    - estimates of a family against a `rival`: `hypervolume_difference`, with `greater` the share of draws in which it
      is above 0 and `dominates` that in which every arm of the rival is matched on both axes; and `front_gap`, by how
      much its quality is better at equal diversity, in the unit of the measure, over the range that both have arms in.

    Args:
        values: a measure to the values [seeds, prompts] of every arm.
        families: names to arms.
        diversity: measures of the first axis, and the way that is better.
        quality: of the second.
        draws: of the bootstrap.
        seed: of the draws.
    """
    axes = {
        name: _axis(values[name], better, draws, seed)
        for name, better in {**diversity, **quality}.items()
        if name in values
    }
    records = []
    for across in diversity:
        for up in quality:
            x, y = axes.get(across), axes.get(up)
            if x is not None and y is not None and min(x.span, y.span) > 0:
                records += _pair(across, up, x, y, families)
    return records


class _Axis(NamedTuple):
    """The means of a measure for every arm, scaled."""

    scaled: dict[Arm, Array]  # [1 + draws]
    worst: float
    span: float  # of the means, in the measure's unit
    better: int
    num: int  # prompts

    def unscaled(self, values: Array) -> Array:
        return self.better * (self.worst + self.span * values)


def _axis(values: Mapping[Arm, Array], better: int, draws: int, seed: int) -> _Axis | None:
    """None where no prompt has a value of every arm, or the arms' means are all the same."""
    arms = {arm: np.atleast_2d(matrix) for arm, matrix in values.items()}
    known = np.logical_and.reduce([np.isfinite(matrix).any(0) for matrix in arms.values()])
    if not known.any():
        return None
    means: dict[Arm, Array] = {}
    for arm, matrix in arms.items():
        kept = np.where(known, matrix, np.nan)
        means[arm] = better * np.concatenate([[np.nanmean(kept)], draws_of(kept, draws, seed)])
    points = [mean[0] for mean in means.values()]
    worst, span = min(points), max(points) - min(points)
    scaled = {arm: (mean - worst) / (span or 1.0) for arm, mean in means.items()}
    return _Axis(scaled, worst, span, better, int(known.sum()))


def _pair(across: str, up: str, x: _Axis, y: _Axis, families: Mapping[str, Sequence[Arm]]) -> list[Record]:
    found = {name: [arm for arm in arms if arm in x.scaled and arm in y.scaled] for name, arms in families.items()}
    clouds = {name: _cloud(x, y, arms) for name, arms in found.items() if arms}
    shared: Record = {"setting": "", "train_seed": None, "group": f"{across} / {up}"}
    num = min(x.num, y.num)
    records = []
    for name, cloud in clouds.items():
        records.append({"kind": "curve", "policy": name, **shared, **_front(cloud, across, up, x, y)})
        records.append(_estimate("hypervolume", areas(cloud), num) | {"policy": name} | shared)
    for first, second in combinations(clouds, 2):
        a, b = clouds[first], clouds[second]
        names = {"policy": first, "rival": second} | shared
        records.append(_estimate("hypervolume_difference", areas(a) - areas(b), num) | _wins(a, b) | names)
        records.append(_estimate("front_gap", y.span * _gap(a, b), num) | names)
    return records


def _cloud(x: _Axis, y: _Axis, arms: Sequence[Arm]) -> Cloud:
    # A draw without a value (all its prompts lacked one) lies at the worst corner.
    columns = (np.stack([axis.scaled[arm] for arm in arms], axis=1) for axis in (x, y))
    return Cloud(*(np.nan_to_num(column, nan=0.0) for column in columns))


def areas(cloud: Cloud) -> Array:
    """The area above (0, 0) that a family's points dominate, in every row -> [rows]."""
    order = np.argsort(-cloud.x, axis=1)
    x = np.take_along_axis(cloud.x, order, 1).clip(min=0)
    y = np.take_along_axis(cloud.y, order, 1).clip(min=0)
    # From the best x down, each step to the next point is as high as the best y so far.
    steps = x - np.concatenate([x[:, 1:], np.zeros((len(x), 1))], axis=1)
    return np.asarray((steps * np.maximum.accumulate(y, axis=1)).sum(1))


def heights(cloud: Cloud, grid: Array) -> Array:
    """The best y of the points at x or better, for every x of a grid [grid] or [rows, grid] -> [rows, grid].

    It is nan where there is no point.
    """
    reached = cloud.x[:, None, :] >= grid[..., None] - 1e-12
    best = np.where(reached, cloud.y[:, None, :], -np.inf).max(-1)
    return np.where(np.isfinite(best), best, np.nan)


def _front(cloud: Cloud, across: str, up: str, x: _Axis, y: _Axis) -> Record:
    found = heights(cloud, _GRID)
    there = np.isfinite(found[0])
    low, high = np.quantile(np.nan_to_num(found[1:], nan=0.0), [0.025, 0.975], axis=0)
    if y.better < 0:
        low, high = high, low
    line = {
        key: np.where(there, y.unscaled(value), np.nan)
        for key, value in (("y", found[0]), ("low", low), ("high", high))
    }
    lists = {key: value.tolist() for key, value in line.items()}
    return {"name": "front", "x": x.unscaled(_GRID).tolist(), **lists, "weight": None, "x_name": across, "y_name": up}


def _wins(a: Cloud, b: Cloud) -> Record:
    """Shares of the draws in which a has the larger area, and in which it has every point of b on its own front."""
    first, second = areas(a)[1:], areas(b)[1:]
    greater = (first > second).mean() + (first == second).mean() / 2
    return {"greater": float(greater), "dominates": _dominates(a, b), "dominated": _dominates(b, a)}


def _dominates(a: Cloud, b: Cloud) -> float:
    beaten = (a.x[1:, :, None] >= b.x[1:, None, :]) & (a.y[1:, :, None] >= b.y[1:, None, :])
    return float(np.all(np.any(beaten, axis=1), axis=1).mean())


def _gap(a: Cloud, b: Cloud) -> Array:
    """Mean of a's height less b's over the range that both have points in, each row over its own -> [rows]."""
    # Fronts are flat up to their first point, so ranges that do not overlap meet at the end of the lower one.
    right = np.minimum(a.x.max(1), b.x.max(1))
    left = np.minimum(right, np.maximum(a.x.min(1), b.x.min(1)))
    grid = np.linspace(left, right, len(_GRID), axis=1)
    return np.asarray((heights(a, grid) - heights(b, grid)).mean(1))


def _estimate(name: str, rows: Array, num: int) -> Record:
    return {"kind": "estimate", "name": name, **interval(float(rows[0]), rows[1:], num)._asdict()}
