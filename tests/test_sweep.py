"""A sweep by its folders: what it runs, skips and resumes, what it chooses, and what it says.

Where only the choice is tested, runs are put there as a finished `spl fit` leaves them: a summary, and what was printed
after the command.
"""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from spl.cli import main
from spl.results import read
from spl.runs import FINISHED, Outcome, Run
from spl.sweep import Select, sweep
from spl.types import UserError

TINY = str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")


def commands(capsys: pytest.CaptureFixture[str], *args: Any, **settings: Any) -> list[list[str]]:
    """What a sweep would run."""
    sweep(*args, **settings, dry_run=True)
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def option(command: list[str], name: str) -> str:
    """The last value of an option, which is the one that counts."""
    return command[len(command) - command[::-1].index(name)]


def finish(command: list[str], end: dict[str, float]) -> None:
    """Leave what a run leaves."""
    folder = Path(option(command, "--output"))
    run = Run("", tuple(command[1:]), folder / "terminal.txt", folder / "summary.json")
    folder.mkdir(parents=True)
    run.log.write_text(run.first_line + FINISHED)
    (folder / "summary.json").write_text(
        json.dumps({"finished": True, "steps": 5, "seconds": 1.5, "start": {}, "end": end})
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = {"dpo": {"model": "configs/model/dpo.yaml"}, "spl 1.2": {"model.global_temperature": 1.2}}
    grid = {"model.lr": [1e-4, 3e-4], "model.lora_targets": [["q_proj", "v_proj"]]}
    settings = {"trainer.max_steps": 5, "model.alpha": None}
    found = commands(capsys, [TINY], str(tmp_path), policies, grid, [0, 7], settings, cache="kept")
    assert len(found) == len({option(command, "--output") for command in found}) == 2 * 2 * 2
    assert {option(command, "--reference.cache") for command in found} == {"kept"}
    command = found[-1]
    assert command[:4] == ["spl", "fit", "--config", TINY] and command[-1] == "--resume"
    values = {"--trainer.max_steps": "5", "--model.alpha": "null", "--model.global_temperature": "1.2"}
    values |= {"--model.lr": "0.0003", "--seed_everything": "7", "--data.seed": "7"}
    assert {name: option(command, name) for name in values} == values
    assert json.loads(option(command, "--model.lora_targets")) == ["q_proj", "v_proj"]
    assert Path(option(command, "--output")).name.startswith("spl-1.2_model.lr=0.0003_")
    assert option(found[0], "--model") == "configs/model/dpo.yaml"


def test_the_best_is_chosen_by_the_first_seeds_and_alone_run_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two policies with their best rates at different ends; a number that is none never wins."""
    losses = {"dpo": {"0.1": 0.3, "0.2": 0.5, "0.4": math.nan}, "spl": {"0.1": 0.9, "0.2": 0.8, "0.4": 0.4}}
    args: dict[str, Any] = {
        "policies": {"dpo": {}, "spl": {"model.alpha": 1}},
        "grid": {"model.lr": [0.1, 0.2, 0.4], "model.beta": [0.1, 0.2]},
        "seeds": [0, 1],
    }
    for command in commands(capsys, [TINY], str(tmp_path), **args):
        policy = Path(option(command, "--output")).name.split("_")[0]
        seed, lr = option(command, "--seed_everything"), option(command, "--model.lr")
        best = {"dpo": "0.1", "spl": "0.4"}[policy]
        if seed == "0" or lr == best:  # what the choice leaves out is not there, and would be run
            finish(command, {"val/loss": losses[policy][lr] + float(option(command, "--model.beta"))})
    sweep([TINY], str(tmp_path), **args, select=Select("val/loss", "min", ["model.lr"]))
    found = rows(tmp_path)
    assert len(found) == 2 * (3 + 1) * 2
    chosen = {(row["policy"], row["group"], row["train_seed"]) for row in found if row["chosen"] == "True"}
    assert chosen == {
        (policy, f"model.lr {lr}, model.beta {beta}", seed)
        for policy, lr in (("dpo", "0.1"), ("spl", "0.4"))
        for beta in ("0.1", "0.2")
        for seed in ("0", "1")
    }
    assert "the best of its policy" in capsys.readouterr().out


def test_a_value_that_failed_for_a_seed_is_not_chosen_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large rate ends better where it ends."""
    args: dict[str, Any] = {"grid": {"model.lr": [0.1, 0.4]}, "seeds": [0, 1]}
    for command in commands(capsys, [TINY], str(tmp_path), **args):
        lr, seed = option(command, "--model.lr"), option(command, "--seed_everything")
        if (lr, seed) != ("0.4", "1"):
            finish(command, {"val/loss": {"0.1": 0.6, "0.4": 0.2}[lr]})

    def failing(runs: Sequence[Run], jobs: int) -> list[Outcome]:
        return [Outcome("finished") if run.is_finished() else Outcome("failed", said="not finite") for run in runs]

    monkeypatch.setattr("spl.sweep.execute", failing)
    with pytest.raises(SystemExit):
        sweep([TINY], str(tmp_path), **args, select=Select(num_seeds=2))
    chosen = {(row["group"], row["train_seed"]) for row in rows(tmp_path) if row["chosen"] == "True"}
    assert chosen == {("model.lr 0.1", "0"), ("model.lr 0.1", "1")}


def test_figures_are_kept_by_policy_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args: dict[str, Any] = {"policies": {"dpo [b]": {}, "spl 2": {"model.global_temperature": 2}}, "seeds": [3, 4]}
    for number, command in enumerate(commands(capsys, [TINY], str(tmp_path), **args)):
        finish(command, {"val/loss": 0.5 + number, "val/length": 8.0})
    sweep([TINY], str(tmp_path), **args)
    results = read(tmp_path / "sweep.jsonl")
    assert results.header["program"] == "sweep"
    values = {(r["policy"], r["train_seed"]): r["value"] for r in results.of("estimate") if r["name"] == "val/loss"}
    assert values == {("dpo [b]", 3): 0.5, ("dpo [b]", 4): 1.5, ("spl 2", 3): 2.5, ("spl 2", 4): 3.5}
    assert [row["val/length"] for row in rows(tmp_path)] == ["8.0"] * 4
    assert all(row["chosen"] == "True" for row in rows(tmp_path))
    assert "dpo [b]" in capsys.readouterr().out


def test_a_result_of_another_command_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "experiment.yaml"
    config.write_text("model:\n  lr: 1.0\n")
    output = tmp_path / "runs"
    (command,) = commands(capsys, [str(config)], str(output))
    finish(command, {})
    sweep([str(config)], str(output))
    with pytest.raises(UserError, match=r"summary\.json was made by another command, other configs or other data"):
        sweep([str(config)], str(output), settings={"trainer.max_steps": 9})
    config.write_text("model:\n  lr: 2.0\n")
    with pytest.raises(UserError, match="other configs"):
        sweep([str(config)], str(output))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"jobs": 0}, "jobs is the number of runs at a time"),
        ({"grid": {"model.lr": [0.1], "model.beta": []}}, "grid has no value for model.beta"),
        ({"select": Select(over=["model.lr"])}, "select.over names model.lr, of which grid has no values"),
        ({"policies": {"a b": {}, "a-b": {}}}, "two runs would share the folder a-b_seed=0"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sweep([TINY], str(tmp_path), **settings)
    assert not list(tmp_path.iterdir())


def test_a_choice_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"model.lr": [0.1, 0.2]}
    for lr, command in zip((0.1, 0.2), commands(capsys, [TINY], str(tmp_path), grid=grid), strict=True):
        finish(command, {"val/rewards/accuracies": lr})
    select = ["--select.metric", "val/rewards/accuracies", "--select.mode", "max", "--select.over", '["model.lr"]']
    main(["sweep", TINY, "--output", str(tmp_path), "--grid", json.dumps(grid), *select])
    assert [row["chosen"] for row in rows(tmp_path)] == ["False", "True"]


def test_a_metric_that_no_run_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"model.lr": [0.1]}
    (command,) = commands(capsys, [TINY], str(tmp_path), grid=grid)
    finish(command, {"val/loss": 1.0})
    with pytest.raises(UserError, match=r"select.metric val/los is no figure of .*: expected one of val/loss"):
        sweep([TINY], str(tmp_path), grid=grid, select=Select("val/los"))


def test_a_stopped_sweep_goes_on_and_a_failed_run_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM reaches the run, which saves; the same command then resumes it, and says which other run failed."""
    output, steps = tmp_path / "runs", 100
    settings = {"trainer.max_steps": steps, "trainer.enable_progress_bar": False}
    config = tmp_path / "sweep.yaml"
    policies = {"bad": {"model.alpha": -1}, "good": {"model.alpha": 0.2}}
    given = {"experiment": [TINY], "output": str(output), "policies": policies, "settings": settings}
    config.write_text(yaml.safe_dump(given | {"policies": {"good": policies["good"]}}))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "spl.cli", "sweep", "--config", str(config)], env=environment)
    good = output / "good_seed=0"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (good / "metrics.csv").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert (good / "checkpoints/last.ckpt").exists() and not (good / "summary.json").exists()

    config.write_text(yaml.safe_dump(given))
    with pytest.raises(SystemExit) as raised:
        main(["sweep", "--config", str(config)])
    assert raised.value.code == 1
    found = {row["policy"]: row for row in rows(output)}
    assert found["bad"]["state"] == "failed" and "alpha is the entropy coefficient" in found["bad"]["said"]
    assert found["good"]["state"] == "finished" and found["good"]["steps"] == str(steps)
    with (good / "metrics.csv").open(newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == list(range(steps))

    before = (good / "summary.json").stat().st_mtime_ns
    config.write_text(yaml.safe_dump(given | {"policies": {"good": policies["good"]}}))
    main(["sweep", "--config", str(config)])
    assert (good / "summary.json").stat().st_mtime_ns == before
    assert "good" in capsys.readouterr().out
