"""All that a report is drawn from: the records of every file, checked, each knowing its program and its policy."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spl import results
from spl.reporting.runs import Run, find_runs, read_run
from spl.results import Record, Results, ResultsError

FAMILIES = ("base", "dpo", "spl")


class Arm(NamedTuple):
    """A policy as it was decoded: what points, rows and columns of a report stand for."""

    policy: str
    setting: str

    def __str__(self) -> str:
        return f"{self.policy}, {self.setting}" if self.setting else self.policy


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _perhaps(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _message(value: Any) -> bool:
    return isinstance(value, dict) and _text(value.get("role")) and _text(value.get("content"))


def _values(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


_NUMBERS, _TEXTS = _list_of(_number), _list_of(_text)
_ARM = {"policy": _text, "setting": _text}
# What the report reads of a record; a kind that is not here is not drawn.
_FORMS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "prompt": {"item": _text, "messages": _list_of(_message)},
    "sample": _ARM | {"item": _text, "text": _text, "num_tokens": _number, "finish": _text, "logp": _number},
    "item": _ARM | {"item": _text, "group": _perhaps(_text), "values": _values},
    "estimate": _ARM
    | {"name": _text, "group": _perhaps(_text), "value": _number, "low": _number, "high": _number, "num": _number},
    "curve": _ARM
    | {"name": _text, "group": _perhaps(_text), "x": _NUMBERS, "y": _NUMBERS, "low": _perhaps(_NUMBERS)}
    | {"high": _perhaps(_NUMBERS), "weight": _perhaps(_NUMBERS)},
    "shares": {"policy": _text, "item": _text, "question": _text, "options": _TEXTS}
    | {"people": _perhaps(_NUMBERS), "model": _NUMBERS, "mass": _number},
    "example": _ARM | {"item": _text, "prompt": _text, "texts": _TEXTS},
    "note": {"text": _text},
}
# Lists of a record that belong together.
_PARALLEL = {"curve": ("x", "y", "low", "high", "weight"), "shares": ("options", "people", "model")}
# What is told of families of policies; its `policy` is a family's name.
_OF_FAMILIES = ("front", "hypervolume", "hypervolume_difference", "front_gap")
# Fields that may be left out of a record, and what they are then.
_DEFAULTS: Record = {"setting": "", "train_seed": None, "group": None, "low": None, "high": None, "num": None}
_DEFAULTS |= {"weight": None, "people": None, "mass": None, "logp": None, "num_tokens": None, "finish": ""}


Estimates = Mapping[tuple[str, str | None], Mapping[Arm, Record]]
"""Of a program: by the measure's name and the group of items it is of."""


class Evidence:
    """Files and runs, in the order they were named.

    Attributes:
        files: results files, their records with `program` and `file` added.
        runs: training runs.
    """

    def __init__(self, files: Sequence[Results], runs: Sequence[Run]) -> None:
        self.files, self.runs = files, runs
        self._of: dict[str, list[Record]] = {}
        for file in files:
            for record in file.records:
                self._of.setdefault(record["kind"], []).append(record)

    def of(self, kind: str, program: str | None = None) -> list[Record]:
        """Records of a kind, of all programs or of one."""
        return [record for record in self._of.get(kind, ()) if program in (None, record["program"])]

    def estimates(self, program: str) -> Estimates:
        """Estimates of arms of a program that have a value."""
        found: dict[tuple[str, str | None], dict[Arm, Record]] = {}
        for record in self.of("estimate", program):
            if record["value"] is not None and record["name"] not in _OF_FAMILIES:
                found.setdefault((record["name"], record["group"]), {})[arm_of(record)] = record
        return found

    def of_families(self, pair: str) -> list[Record]:
        """Fronts and their comparisons for a pair of measures, "diversity / quality"."""
        records = (*self.of("curve"), *self.of("estimate"))
        return [record for record in records if record["name"] in _OF_FAMILIES and record["group"] == pair]

    def policies(self) -> list[str]:
        """Labels of all policies, references first, then DPO, then SPL by alpha / beta."""
        records = [record for file in self.files for record in file.records if record.get("policy")]
        found = {record["policy"] for record in records if record.get("name") not in _OF_FAMILIES}
        return sorted(found | {run.policy for run in self.runs}, key=policy_order)


def arm_of(record: Record) -> Arm:
    """Whom a record speaks of."""
    return Arm(record["policy"], record["setting"])


def family(policy: str) -> str:
    """The first word of a label, and "base" for all that stands for the start of training or is but a yardstick."""
    word = policy.lower().replace("-", " ").replace("_", " ").split(" ")[0]
    return "base" if word in ("base", "reference", "ref", "sft", "start") or is_yardstick(policy) else word


def is_yardstick(policy: str) -> bool:
    """Whether a label is of no policy, but of what policies are read against, such as "(uniform)"."""
    return policy.startswith("(")


def policy_order(policy: str) -> tuple[int, str, float, str]:
    """Sorts labels: by family, then by the number in the label; yardsticks last."""
    known = family(policy)
    rank = FAMILIES.index(known) if known in FAMILIES else len(FAMILIES)
    return rank + 10 * is_yardstick(policy), known, number_in(policy), policy


def setting_order(setting: str) -> tuple[bool, str, float, str]:
    """Sorts ways of decoding: temperatures first, then by kind, by the number in them."""
    kind = setting.split(" ")[0]
    return kind not in ("", "t"), kind, number_in(setting), setting


def arm_order(arm: Arm) -> tuple[tuple[int, str, float, str], tuple[bool, str, float, str]]:
    """Sorts arms: by policy, then by decoding."""
    return policy_order(arm.policy), setting_order(arm.setting)


def number_in(label: str) -> float:
    """The last number of a label, 1 where it has none."""
    for word in reversed(label.replace("=", " ").split()):
        try:
            return float(word)
        except ValueError:
            continue
    return 1.0


def gather(paths: Iterable[Path]) -> Evidence:
    """Read results files, folders of them, and run folders.

    Raises:
        ResultsError: a file is none, a record is not what its kind must be, or two files would be drawn as one.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for path in paths:
        runs = find_runs(path)
        folders += runs
        if not runs or any(map(results.is_results, path.rglob("*.jsonl*"))):
            files += results.find([path])
    read = [_checked(results.read(file)) for file in dict.fromkeys(files)]
    _refuse_same(read)
    return Evidence(read, [read_run(folder) for folder in dict.fromkeys(folders)])


def _refuse_same(files: Iterable[Results]) -> None:
    """Two files that hold the same estimate, of other prompts or of another day, would be drawn over each other."""
    where: dict[tuple[str | None, ...], Path] = {}
    for file in files:
        for record in file.of("estimate") if file.header["program"] != "sweep" else ():  # these are in the table alone
            arm, group = arm_of(record), record["group"]
            before = where.setdefault((record["program"], *arm, record["name"], group, record.get("rival")), file.path)
            if before != file.path:
                told = ", ".join(filter(None, (record["name"], str(arm), group)))
                raise ResultsError(f"{before} and {file.path} both hold an estimate of {told}: report them apart.")


def _checked(file: Results) -> Results:
    return Results(file.header, list(_complete(file)), file.path)


def _complete(file: Results) -> Iterator[Record]:
    """Records of known kinds with what they leave out: the header's policy, and null."""
    if not _text(file.header.get("program")):
        raise ResultsError(f"{file.path}, line 1: expected a header with a program.")
    shared = {name: file.header[name] for name in ("policy", "setting", "train_seed") if name in file.header}
    given = {"program": file.header["program"], "file": file.path.name}
    for number, record in enumerate(file.records, 2):
        if form := _FORMS.get(record["kind"]):
            whole = _DEFAULTS | shared | record | given
            for name, fits in form.items():
                if name not in whole or not fits(whole[name]):
                    shown = json.dumps(whole[name])[:80] if name in whole else "nothing"
                    raise ResultsError(
                        f"{file.path}, record {number}: {record['kind']!r} has {shown} as {name!r}, "
                        "which is not what spl evaluate writes there."
                    )
            if len({len(whole[name]) for name in _PARALLEL.get(whole["kind"], ()) if whole[name] is not None}) > 1:
                raise ResultsError(f"{file.path}, record {number}: its lists differ in length.")
            whole.pop("token_ids", None)  # which no page shows, and which take more memory than texts do
            yield whole
