"""Training runs as `spl fit` leaves them: their curves from metrics.csv, and whether they were finished."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from spl.results import ResultsError


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        policy: label of what it trained.
        setting: what else sets it apart from other runs of the policy.
        curves: a logged name to its (step, value) in order.
        facts: steps and seconds of summary.json; empty where the run has not ended.
    """

    policy: str
    setting: str
    folder: Path
    curves: dict[str, list[tuple[int, float]]]
    facts: dict[str, float]


def find_runs(path: Path) -> list[Path]:
    """The run folders at and under a path."""
    return sorted(file.parent for file in path.rglob("metrics.csv")) if path.is_dir() else []


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ResultsError: metrics.csv or summary.json is broken.
    """
    policy, setting = _names(folder.name)
    return Run(policy, setting, folder, _curves(folder / "metrics.csv"), _facts(folder / "summary.json"))


def _names(name: str) -> tuple[str, str]:
    """Policy and the rest of a folder's name, such as spl-1.2_model.lr=1e-5_seed=0 of a sweep; else the name and ""."""
    policy, _, rest = name.partition("_")
    if not rest.rpartition("_")[2].startswith("seed="):
        return name, ""
    return policy.replace("-", " "), rest.replace("_", ", ")


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                for name, text in row.items():
                    if text and name not in ("step", "epoch") and math.isfinite(value := float(text)):
                        curves.setdefault(name, []).append((int(row["step"]), value))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ResultsError(f"{path} is not the metrics.csv of a run: {error}.") from error
    return curves


def _facts(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(facts[name]) for name in ("steps", "seconds")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not the summary.json of a run: {error}.") from error
