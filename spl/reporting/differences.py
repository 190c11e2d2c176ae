"""How far every arm is from the one that others are held against, paired over the same items."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from spl.intervals import Array, Interval, paired_difference
from spl.reporting.evidence import Arm, Evidence, arm_of, arm_order, family
from spl.results import ResultsError

_DRAWS = 1000


class Key(NamedTuple):
    """What an estimate is of."""

    program: str
    arm: Arm
    name: str
    group: str | None


def rival(arms: list[Arm], baseline: str | None) -> Arm:
    """The arm that others are held against: the one named, or DPO at temperature 1, or the first.

    Raises:
        ResultsError: no arm has that name.
    """
    ordered = sorted(arms, key=arm_order)
    if baseline is not None:
        named = [arm for arm in ordered if baseline in (str(arm), arm.policy)]
        if not named:
            raise ResultsError(f"baseline must be one of {', '.join(map(str, ordered))}, but is {baseline!r}.")
        return named[0]
    return min(ordered, key=lambda arm: (family(arm.policy) != "dpo", arm.setting not in ("", "t 1")))


def differences(evidence: Evidence, baseline: str | None = None) -> dict[Key, tuple[Arm, Interval]]:
    """Mean less the rival's, with its interval, for every estimate whose values by item are there for both.

    Raises:
        ResultsError: `baseline` names no arm.
    """
    found: dict[Key, tuple[Arm, Interval]] = {}
    if baseline is not None:
        rival([arm_of(record) for record in evidence.of("estimate")], baseline)
    for program in dict.fromkeys(file.header["program"] for file in evidence.files):
        values = _values(evidence, program)
        for (name, group), arms in evidence.estimates(program).items():
            known = {arm: values[arm, name, group] for arm in arms if (arm, name, group) in values}
            if len(known) < 2:
                continue
            try:
                against = rival(list(known), baseline)
            except ResultsError:  # it is an arm of other programs
                continue
            for arm in known.keys() - {against}:
                interval = _difference(known[arm], known[against])
                if interval.num > 1:  # one item drawn again and again is always itself
                    found[Key(program, arm, name, group)] = against, interval
    return found


Values = Mapping[tuple[str, int | None], float]  # by item and training seed


def _values(evidence: Evidence, program: str) -> dict[tuple[Arm, str, str | None], Values]:
    """Values by item, of each group, of what it is a part of ("gsm8k" of "gsm8k, hard") and, under None, of all."""
    found: dict[tuple[Arm, str, str | None], dict[tuple[str, int | None], float]] = {}
    for record in evidence.of("item", program):
        for name, value in record["values"].items():
            for group in {record["group"], (record["group"] or "").partition(", ")[0] or None, None}:
                if value is not None:
                    of = found.setdefault((arm_of(record), name, group), {})
                    of[record["item"], record["train_seed"]] = value
    return dict(found)


def _difference(a: Values, b: Values) -> Interval:
    items = sorted({item for item, _ in a} & {item for item, _ in b})
    return paired_difference(_matrix(a, items), _matrix(b, items), draws=_DRAWS)


def _matrix(values: Values, items: list[str]) -> Array:
    """[seeds, items], nan where there is no value."""
    seeds = sorted({seed for _, seed in values}, key=str)
    return np.array([[values.get((item, seed), np.nan) for item in items] for seed in seeds])
