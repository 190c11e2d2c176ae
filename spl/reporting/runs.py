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
        policy: its label, the folder's name.
        curves: a logged name to its (step, value) in order.
        facts: steps and seconds of summary.json; empty where the run has not ended.
    """

    policy: str
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
    return Run(folder.name, folder, _curves(folder / "metrics.csv"), _facts(folder / "summary.json"))


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
