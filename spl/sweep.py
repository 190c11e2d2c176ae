"""A sweep: policies x a grid of settings x seeds over one experiment, each a run of `spl fit` in a folder of its own.

Every run is a process that could have been started by hand, and all share one cache of the reference. A sweep that was
stopped goes on by the same command: what is finished is skipped, what was begun is resumed.
"""

import csv
import io
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spl.disk import replacing
from spl.results import Record, header, write
from spl.runs import Outcome, Run, arguments, check_jobs, execute, file_name, written
from spl.types import UserError

log = logging.getLogger(__name__)

Point = tuple[tuple[str, str], ...]
"""A combination of the grid: settings and their values, as written on a command line."""
SHOWN = ["val/loss", "val/rewards/accuracies", "val/rewards/margins", "val/token_entropy", "val/entropy", "val/length"]
"""Figures in the table, where runs have them; sweep.csv has all."""


@dataclass(frozen=True)
class Select:
    """How the best value of some settings is found for each policy.

    Attributes:
        metric: a figure on held-out data at the end of a run, by its name in summary.json.
        mode: whether it should be small ("min") or large ("max").
        over: settings of the grid that are chosen; every combination of the others gets a choice of its own.
        num_seeds: seeds that the choice is made on, the first ones, by the mean; the others are run at the chosen
            values only.
    """

    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    over: list[str] = field(default_factory=lambda: ["model.lr"])
    num_seeds: int = 1


class Cell(NamedTuple):
    """One combination of the sweep."""

    policy: str
    point: Point
    seed: int

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.policy, _label(self.point), f"seed {self.seed}") if part)

    @property
    def folder(self) -> str:
        """Named by policy, settings and seed."""
        return file_name(self.policy, *map("=".join, self.point), f"seed={self.seed}")


def sweep(
    experiment: list[str],
    output: str,
    policies: dict[str, dict[str, Any]] | None = None,
    grid: dict[str, list[Any]] | None = None,
    seeds: list[int] | None = None,
    settings: dict[str, Any] | None = None,
    select: Select | None = None,
    cache: str | None = None,
    jobs: int = 1,
    dry_run: bool = False,
) -> None:
    """Train policies x a grid of settings x seeds, each by `spl fit` in a folder of its own, and tabulate them.

    The same command goes on with a sweep that was stopped. What the runs came to is in sweep.csv and sweep.jsonl, with
    the chosen ones marked.

    Example: spl sweep configs/experiment/tiny.yaml --policies '{dpo: {model.alpha: null}, spl: {model.alpha: 1}}'
    --grid '{model.lr: [1.0e-4, 1.0e-3]}' --seeds '[0, 1]' --output runs/sweep

    Args:
        experiment: config files of `spl fit`; of two that set the same the later wins.
        output: folder of the runs.
        policies: names to the settings that make each, as {dpo: {model.alpha: null}, spl 1.2:
            {model.global_temperature: 1.2}}; a setting `model` names a config, such as configs/model/hdpo.yaml.
        grid: settings to their values; all combinations are run.
        seeds: of the runs (seed_everything and data.seed); [0] if not given.
        settings: of all runs; those of policies and grid come after them and win.
        select: choose the best value of settings such as the learning rate for each policy; without it all are chosen.
        cache: folder of the reference's log-probabilities, which all runs share; without it the one that runs on this
            machine share in any case.
        jobs: runs at a time. On GPUs each gets one, in turn, by CUDA_VISIBLE_DEVICES.
        dry_run: print the commands and run nothing; with `select`, those that the choice is made by.

    Raises:
        UserError: the settings make no sweep.
        SystemExit: 1 if runs failed, 75 if the sweep was stopped.
    """
    folder, policies, grid, seeds = Path(output), policies or {"": {}}, grid or {}, seeds or [0]
    cells = [Cell(*combination) for combination in product(policies, _points(grid), seeds)]
    _check(cells, grid, select, jobs)
    configs = [arg for path in experiment for arg in ("--config", path)]
    shared = (*configs, *arguments((settings or {}) | ({"reference.cache": cache} if cache else {})))
    runs = {cell: _run(cell, folder, (*shared, *arguments(policies[cell.policy]))) for cell in cells}
    first = cells if select is None else [cell for cell in cells if cell.seed in seeds[: select.num_seeds]]
    if dry_run:
        for cell in first:
            Console(soft_wrap=True).print(runs[cell].command, markup=False, highlight=False)
        return
    outcomes = _execute(first, runs, jobs)
    chosen = _chosen(outcomes, runs, select) if select else {(cell.policy, cell.point) for cell in cells}
    outcomes |= _execute([c for c in cells if c not in outcomes and (c.policy, c.point) in chosen], runs, jobs)
    rows = [_row(cell, outcomes[cell], runs[cell], (cell.policy, cell.point) in chosen) for cell in outcomes]
    given: Record = {"policies": policies, "grid": grid, "seeds": seeds, "settings": settings}
    given |= {"select": asdict(select) if select else None}
    write(folder / "sweep.jsonl", header("sweep", given, [Path(path) for path in experiment]), _records(rows))
    _write_csv(folder / "sweep.csv", rows)
    _tell(rows, ([select.metric] if select else []) + SHOWN)


def _tell(rows: Sequence[Record], names: Sequence[str]) -> None:
    """The table, and the exit status."""
    Console().print(_table(rows, names))
    if failed := sum(row["state"] == "failed" for row in rows):
        log.error("%d of %d runs failed; the same command tries them again.", failed, len(rows))
        raise SystemExit(1)


def _points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    return [tuple(zip(grid, map(written, values), strict=True)) for values in product(*grid.values())]


def _check(cells: Sequence[Cell], grid: Mapping[str, Any], select: Select | None, jobs: int) -> None:
    check_jobs(jobs)
    if empty := [name for name, values in grid.items() if not values]:
        raise UserError(f"grid has no value for {empty[0]}, so there is nothing to run: give it one, or leave it out.")
    if select and (missing := [name for name in select.over if name not in grid]):
        raise UserError(f"select.over names {missing[0]}, of which grid has no values: add it to the grid.")
    if select and select.num_seeds < 1:
        raise UserError(f"select.num_seeds must be 1 or more, but is {select.num_seeds}.")
    folders: dict[str, Cell] = {}
    for cell in cells:
        other = folders.setdefault(cell.folder, cell)
        if other is not cell:
            raise UserError(f"two runs would share the folder {cell.folder} ({other.label}; {cell.label}): rename one.")


def _run(cell: Cell, folder: Path, args: tuple[str, ...]) -> Run:
    own = folder / cell.folder
    last = arguments({"seed_everything": cell.seed, "data.seed": cell.seed, "output": str(own)})
    args = ("fit", *args, *arguments(dict(cell.point)), *last, "--resume")
    return Run(cell.label, args, own / "terminal.txt", own / "summary.json")


def _label(point: Point) -> str:
    return ", ".join(map(" ".join, point))


def _execute(cells: Sequence[Cell], runs: Mapping[Cell, Run], jobs: int) -> dict[Cell, Outcome]:
    return dict(zip(cells, execute([runs[cell] for cell in cells], jobs), strict=True))


def _chosen(outcomes: Mapping[Cell, Outcome], runs: Mapping[Cell, Run], select: Select) -> set[tuple[str, Point]]:
    """The best point of every policy and every combination of what is not chosen, of those whose runs all finished.

    Raises:
        UserError: a run has no such figure.
    """
    scores: dict[tuple[str, Point], list[float]] = {}
    for cell, outcome in outcomes.items():
        # A value that failed for one seed is not chosen by the others, which may have been luckier.
        score = math.nan if outcome.state == "failed" else _figure(runs[cell], select.metric)
        scores.setdefault((cell.policy, cell.point), []).append(score)
    best: dict[tuple[str, Point], tuple[float, Point]] = {}
    for (policy, point), values in scores.items():
        score = statistics.fmean(values) * (1 if select.mode == "min" else -1)
        rest = tuple(pair for pair in point if pair[0] not in select.over)
        if math.isfinite(score):
            best[policy, rest] = min(best.get((policy, rest), (math.inf, point)), (score, point))
    return {(policy, point) for (policy, _), (_, point) in best.items()}


def _figure(run: Run, metric: str) -> float:
    figures = json.loads(run.result.read_text())["end"]
    if metric not in figures:
        raise UserError(
            f"select.metric {metric} is no figure of {run.result}: expected one of {', '.join(sorted(figures))}."
        )
    return float(figures[metric])


def _row(cell: Cell, outcome: Outcome, run: Run, chosen: bool) -> Record:
    """What is known of a run at its end."""
    facts = json.loads(run.result.read_text()) if outcome.state != "failed" else {"end": {}}
    return {
        "kind": "run",
        "policy": cell.policy,
        "group": _label(cell.point) or None,
        "train_seed": cell.seed,
        "state": "failed" if outcome.state == "failed" else "finished",
        "chosen": chosen,
        "steps": facts.get("steps"),
        "seconds": facts.get("seconds"),
        "folder": str(run.result.parent),
        "said": outcome.said,
        "figures": facts["end"],
    }


def _records(rows: Sequence[Record]) -> Iterator[Record]:
    """The runs, what failed, and every final figure of each."""
    yield from rows
    for row in rows:
        if row["state"] == "failed":
            yield {"kind": "note", "text": f"The run {Path(row['folder']).name} failed and is left out: {row['said']}"}
    for row in rows:
        who = {key: row[key] for key in ("policy", "group", "train_seed")}
        for name, value in row["figures"].items():
            figure = {"name": name, "value": value, "low": None, "high": None, "num": None}
            yield {"kind": "estimate", "setting": "", **who, **figure}


def _write_csv(path: Path, rows: Sequence[Record]) -> None:
    names = sorted({name for row in rows for name in row["figures"]})
    columns = [name for name in rows[0] if name not in ("kind", "figures")]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*columns, *names])
    writer.writerows([*(row[c] for c in columns), *(row["figures"].get(n) for n in names)] for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _table(rows: Sequence[Record], names: Sequence[str]) -> Table:
    """One line a run, with the figures that any of them has."""
    shown = [name for name in dict.fromkeys(names) if any(name in row["figures"] for row in rows)]
    table = Table(title="Sweep: held-out figures at the end of each run", title_justify="left")
    for column in ("policy", "settings", "seed", *(name.removeprefix("val/") for name in shown), "seconds"):
        table.add_column(column, justify="left" if column in ("policy", "settings") else "right", overflow="fold")
    for row in rows:
        cells = [_shown(row["figures"].get(name)) for name in shown]
        label = f"{row['group'] or ''}{' *' if row['chosen'] and not all(r['chosen'] for r in rows) else ''}"
        last = row["state"] if row["state"] == "failed" else _shown(row["seconds"])
        table.add_row(escape(row["policy"]), escape(label), str(row["train_seed"]), *cells, last)
    if not all(row["chosen"] for row in rows):
        table.caption = "* the best of its policy, by which the other seeds were run"
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
