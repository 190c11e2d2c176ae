"""A run on a stream by the command line: killed and resumed it ends as if nothing had been."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_base import pairs

from spl.cli import main

TINY = str(Path(__file__).parents[2] / "configs/experiment/tiny.yaml")


def command(output: Path, mixture: dict[str, float], *more: str) -> list[str]:
    options = {
        "--output": str(output),
        "--data.streaming": "true",
        "--data.mixture": json.dumps(mixture),
        "--data.batch_size": "2",
        "--data.buffer_size": "7",
        "--data.num_workers": "2",
        "--data.bad_rows": "skip",
        "--data.max_bad_share": "0.3",
        "--trainer.max_steps": "40",
        "--trainer.accumulate_grad_batches": "2",
        "--trainer.check_val_every_n_epoch": "1",
        "--trainer.val_check_interval": "24",
        "--trainer.enable_progress_bar": "false",
        "--checkpoint.every_n_train_steps": "3",
    }
    return ["fit", "--config", TINY, *(word for option in options.items() for word in option), *more]


@pytest.fixture
def mixture(tmp_path: Path) -> dict[str, float]:
    files = {str(pairs(tmp_path / "a.jsonl", 40)): 2.0, str(pairs(tmp_path / "b.jsonl", 15)): 1.0}
    for name in files:
        with Path(name).open("a") as file:
            file.write("{broken\n" * 3)
    return files


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path: Path, mixture: dict[str, float]) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    main(command(straight, mixture))
    assert not multiprocessing.active_children()  # a stream's workers would go on without end
    process = subprocess.Popen(
        [sys.executable, "-m", "spl.cli", *command(killed, mixture)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(killed.glob("checkpoints/step=[69]*")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    main(command(killed, mixture, "--resume"))
    hashes = [json.loads((run / "summary.json").read_text())["hashes"] for run in (straight, killed)]
    assert hashes[0] == hashes[1]
    assert losses(straight) == losses(killed)
    assert len(losses(straight)) == 40
    log = (straight / "log.txt").read_text()
    assert "Of the stream: 160 examples; " in log
    assert "rows skipped as unusable" in log
    lines = [
        [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()] for run in (straight, killed)
    ]
    assert {line["where"] for line in lines[0]} == {
        f"{name}, row {n}" for name, k in zip(mixture, (40, 15), strict=True) for n in range(k + 1, k + 4)
    }
    assert len(lines[0]) == 6


def test_a_killed_worker_ends_in_one_sentence(
    tmp_path: Path, mixture: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def kill() -> None:
        while not ((run / "checkpoints").is_dir() and (workers := multiprocessing.active_children())):
            time.sleep(0.01)
        for worker in workers:  # the validation's may be among them, which nobody would miss
            os.kill(worker.pid or 0, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as raised:
        main(command(run, mixture, "--trainer.max_steps", "300", "--data.num_workers", "1"))
    thread.join()
    assert not multiprocessing.active_children()
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: a process that prepares batches was killed, most often because")
    assert "is killed by signal: Killed" in said or "exited unexpectedly" in said
    assert "Traceback" not in said
