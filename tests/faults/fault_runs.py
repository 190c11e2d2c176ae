"""Runs of the tiny experiment that are really killed, and what is compared of them."""

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["--config", str(CONFIGS / "experiment/tiny.yaml"), "--trainer.enable_progress_bar", "false"]
TINY += ["--trainer.max_steps", "24", "--checkpoint.every_n_train_steps", "2"]
TIMED = ("train/tokens_per_second", "train/padded_tokens_per_second", "train/peak_share", "train/memory_gib")


class Lab:
    """Starts, kills and compares runs.

    Args:
        home: of their files.
        rng: draws when they are killed.
    """

    def __init__(self, home: Path, rng: random.Random) -> None:
        self.home = home
        self.rng = rng
        self.kills = 0
        self._references: dict[str, tuple[Path, float]] = {}
        self._cpu = 0.0
        here = Path(__file__).parent
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
        self._zygote = subprocess.Popen(
            [sys.executable, str(here / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def close(self) -> float:
        """CPU seconds of all runs."""
        self._zygote.communicate(timeout=60)
        return self._cpu

    def start(self, folder: Path, *options: str, log: Path | None = None, **hooks: Any) -> int:
        """Process id of a run that goes on in a folder, or begins there."""
        command = ["fit", *TINY, *options, "--output", str(folder), "--resume"]
        return self.start_command(command, log or folder.with_suffix(".log"), **hooks)

    def start_command(self, command: list[str], log: Path, **hooks: Any) -> int:
        """Process id of any command."""
        return self._ask({"run": command, "env": {}, "log": str(log)} | hooks)

    def wait(self, process: int) -> int:
        """Its exit status; negative where a signal killed it."""
        return self._ask({"wait": process})

    def run(self, folder: Path, *options: str, **hooks: Any) -> int:
        return self.wait(self.start(folder, *options, **hooks))

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._zygote.stdin and self._zygote.stdout
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        answer, self._cpu = json.loads(self._zygote.stdout.readline())
        return int(answer)

    def kill(self, process: int, signum: int) -> None:
        """The run and its workers, as a machine that goes down does, or a terminal."""
        self.kills += 1
        os.killpg(process, signum)

    def reference(self, *options: str) -> tuple[Path, float]:
        """The folder of the same run without a fault, and the seconds from its first step to its end."""
        key = " ".join(options)
        if key not in self._references:
            folder = self.home / f"reference-{len(self._references)}"
            process = self.start(folder, *options)
            wait_for(lambda: begun(folder) > 0, 120)
            start = time.monotonic()
            status = self.wait(process)
            assert status == 0, said(folder)
            self._references[key] = folder, time.monotonic() - start
        return self._references[key]

    def kill_at_random(self, folder: Path, options: list[str], signums: list[int], kills: int) -> list[int]:
        """Kill a run, let it go on, kill it again; then let it end. The exit statuses."""
        _, seconds = self.reference(*options)
        statuses: list[int] = []
        for number in range(kills):
            before = begun(folder)
            process = self.start(folder, *options)
            wait_for(lambda before=before, process=process: begun(folder) > before or over(process), 120)
            time.sleep(self.rng.uniform(0, seconds / 2))
            if not over(process):
                self.kill(process, signums[number % len(signums)])
            statuses.append(self.wait(process))
            if statuses[-1] == 0:
                return statuses
        return [*statuses, self.run(folder, *options)]


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.003)


def over(process: int) -> bool:
    """Whether a process has ended; the zygote has not asked for its status yet."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def said(folder: Path) -> str:
    """What a folder's runs have said, their tracebacks among it."""
    log = folder.with_suffix(".log")
    return log.read_text(errors="replace") if log.exists() else ""


def begun(folder: Path) -> int:
    """How often training has started in a folder."""
    return said(folder).count("learning rate")


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of what was exported."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("export/*.safetensors"))
    }


def logged(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """(step, value as written) of every figure but those of time; rows of one step may come in another order."""
    found: dict[str, list[tuple[int, str]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step" and name not in TIMED:
                    found.setdefault(name, []).append((int(row["step"]), value))
    return {name: sorted(values) for name, values in found.items()}


def events(folder: Path) -> dict[str, list[int]]:
    """Steps of every figure in TensorBoard's files."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: sorted(event.step for event in reader.Scalars(name)) for name in reader.Tags()["scalars"]}


def same_run(one: Path, two: Path) -> None:
    """Hold a run that was killed to one that was not."""
    assert weights(one) == weights(two) and weights(one)
    assert logged(one) == logged(two)
    assert events(one) == events(two)
    samples = [folder / "samples.jsonl" for folder in (one, two)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()
    assert (
        json.loads((one / "summary.json").read_text())["end"] == json.loads((two / "summary.json").read_text())["end"]
    )
    assert not list((one / "checkpoints").glob(".writing-*"))


STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
