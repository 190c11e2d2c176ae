"""What a report says first: what was compared, what came out best, and what to beware of."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from spl.intervals import Interval
from spl.reporting.charts import interval_text
from spl.reporting.differences import Key
from spl.reporting.evidence import Arm, Estimates, Evidence, family, is_yardstick
from spl.reporting.fronts import comparisons
from spl.reporting.measures import BEST, DIVERSITY, QUALITY, at_most_samples, measure
from spl.reporting.opinions import whole_groups
from spl.results import Record

Differences = Mapping[Key, tuple[Arm, Interval]]


@dataclass(frozen=True)
class Card:
    """The arm that is best by one measure.

    Attributes:
        measure: with the group of items.
        arm: the best, and how many more are as good.
        policy: of the arm.
        value: with its interval.
        against: how far it is from the arm that others are held against, with its interval; "" where not known.
        clear: whether that interval leaves out 0.
    """

    measure: str
    arm: str
    policy: str
    value: str
    against: str
    clear: bool


# What the items of a program are.
_ITEMS = {
    "diversity-quality": "prompts",
    "best-of-n": "problems",
    "calibration": "questions with an answer",
    "opinions": "questions of opinion",
}


def compared(evidence: Evidence) -> str:
    """What was compared, in one sentence."""
    policies = [policy for policy in evidence.policies() if not is_yardstick(policy)]
    parts = [f"{_count(len(policies), 'policy', 'policies')} ({', '.join(policies)})"]
    settings = {record["setting"] for record in evidence.of("item", "diversity-quality")}
    seeds = {record["train_seed"] for record in evidence.of("item")} - {None}
    parts += [f"{len(settings)} ways of decoding"] if len(settings) > 1 else []
    parts += [f"{len(seeds)} training seeds"] if len(seeds) > 1 else []
    for program, items in _ITEMS.items():
        num = len({record["item"] for record in evidence.of("item", program)})
        parts += [f"{num:,} {items}"] if num else []
    samples = len(evidence.of("sample"))
    parts += [_count(samples, "sample", "samples")] if samples else []
    parts += [_count(len(evidence.runs), "training run", "training runs")] if evidence.runs else []
    return f"{', '.join(parts)}."


def _count(num: int, one: str, many: str) -> str:
    return f"{num:,} {one if num == 1 else many}"


def cards(evidence: Evidence, apart: Differences) -> list[Card]:
    """The best arm by each of the measures that an evaluation is about."""
    return [
        _card(Key(program, _best(arms, name), name, group), arms, apart)
        for program, names in BEST.items()
        for (name, group), arms in _main(evidence, program).items()
        if name.partition("@")[0] in names and not name.endswith("_difference") and len(arms) > 1
    ]


def _main(evidence: Evidence, program: str) -> Estimates:
    """Estimates without those of single groups of people, and without yardsticks."""
    found = evidence.estimates(program)
    whole = whole_groups(found) if program == "opinions" else {group for _, group in found}
    told = at_most_samples(name for name, _ in found)
    return {
        key: {arm: record for arm, record in arms.items() if not is_yardstick(arm.policy)}
        for key, arms in found.items()
        if key[1] in whole and key[0] in told
    }


def _best(arms: Mapping[Arm, Record], name: str) -> Arm:
    return max(arms, key=lambda arm: measure(name).better * arms[arm]["value"])


def _card(key: Key, arms: Mapping[Arm, Record], apart: Differences) -> Card:
    record = arms[key.arm]
    title = f"{measure(key.name).title}, {key.group}" if key.group else measure(key.name).title
    value = interval_text(record["value"], record["low"], record["high"])
    ties = sum(other["value"] == record["value"] for other in arms.values()) - 1
    best = f"{key.arm} and {ties} more" if ties else str(key.arm)
    if key not in apart:
        return Card(title, best, key.arm.policy, value, "", False)
    rival, interval = apart[key]
    clear = not interval.low <= 0 <= interval.high
    against = f"{interval_text(*interval[:3], sign=True)} beside {rival}"
    return Card(title, best, key.arm.policy, value, against, clear)


def fronts(evidence: Evidence) -> list[str]:
    """How the fronts of SPL compare with DPO's, for the first pair of measures that has any."""
    for x, y in product(("cosine_distance", *DIVERSITY), ("reward", "win_rate", "utility_k")):
        records = [r for r in evidence.of_families(f"{x} / {y}") if {"spl", "dpo"} <= _families(r)]
        if sentences := comparisons(records, QUALITY[y]):
            return [f"{measure(x).title} and {measure(y).title.lower()}: {sentence}" for sentence in sentences]
    return []


def _families(record: Record) -> set[str]:
    return {family(record["policy"]), family(record.get("rival") or "")}


def caveats(evidence: Evidence) -> list[str]:
    """The notes of the evaluations, and one of this page's own."""
    texts = [record["text"] for record in evidence.of("note")]
    if any(len(arms) > 2 for program in BEST for arms in evidence.estimates(program).values()):
        texts.append("The best of several is chosen by the same numbers that it is shown with, which flatters it.")
    return list(dict.fromkeys(texts))
