"""Runs that are killed at random and go on end with the weights and the logs of one that was not, bit for bit."""

import signal
import socket
import time
from pathlib import Path

import pytest
from fault_runs import CONFIGS, STATUS, Lab, begun, over, said, same_run, wait_for

from spl.checkpoints import verify

EVERY = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1]
MONITORS = ["--config", str(CONFIGS / "callbacks/monitor.yaml"), "--samples.every_n_steps", "6"]
MONITORS += ["--samples.max_new_tokens", "8", "--samples.num_prompts", "2"]
RUNS = {
    "an epoch of one batch": ([], 12),
    "accumulation, validated in the middle": (
        ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "4",
         "--trainer.check_val_every_n_epoch", "1"],
        6,
    ),
    "a budget of tokens": (["--data.max_tokens", "150", "--data.batch_size", "4"], 8),
    "all weights": (["--model.lora_rank", "0", "--data.batch_size", "4"], 6),
    "monitors": (MONITORS, 6),
    "streaming": (["--data.streaming", "true", "--data.batch_size", "2"], 6),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_ends_as_one_that_was_not(lab: Lab, tmp_path: Path, name: str) -> None:
    options, kills = RUNS[name]
    reference, _ = lab.reference(*options)
    enough, number = lab.kills + kills, 0
    while lab.kills < enough:
        folder = tmp_path / str(number)
        statuses = lab.kill_at_random(folder, options, EVERY, enough - lab.kills)
        assert set(statuses) <= {0, *STATUS.values()}, said(folder)
        assert statuses[-1] == 0, said(folder)
        assert "Traceback" not in said(folder)
        same_run(folder, reference)
        number += 1


def test_killed_in_the_middle_of_a_checkpoint(lab: Lab, folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    seen: set[Path] = set()
    for _ in range(6):
        process = lab.start(folder, slow_writes=0.05)
        most = len(seen) + lab.rng.randint(1, 3)
        while len(seen) < most and not over(process):
            seen |= set(checkpoints.glob(".writing-*"))
        if not over(process):
            lab.kill(process, signal.SIGKILL)
        if lab.wait(process) == 0:
            break
        for path in checkpoints.glob("*.ckpt"):
            verify(path)
    assert lab.run(folder) == 0, said(folder)
    same_run(folder, lab.reference()[0])


def test_killed_after_the_last_step(lab: Lab, folder: Path) -> None:
    for _ in range(5):
        process = lab.start(folder)
        wait_for(lambda process=process: (folder / "checkpoints/step=24.ckpt").exists() or over(process), 120)
        time.sleep(lab.rng.uniform(0, 0.2))
        if not over(process):
            lab.kill(process, signal.SIGKILL)
        if lab.wait(process) == 0:
            break
    assert lab.run(folder) == 0, said(folder)
    same_run(folder, lab.reference()[0])


def test_a_finished_run_is_left_alone(lab: Lab, folder: Path) -> None:
    assert lab.run(folder) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "log.txt"}
    assert lab.run(folder) == 0
    assert "is finished: 24 steps. Nothing to resume." in said(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "log.txt"} == before
    assert begun(folder) == 1


def test_two_processes_killed_at_random(lab: Lab, tmp_path: Path) -> None:
    """One of them alone is sent a signal to stop; both are killed where the machine goes down.

    Before training it stops at once, and the other, which then waits for it, ends in a sentence of its own.
    """
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]

    def start(folder: Path) -> list[int]:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "faults"}
        return [
            lab.start(folder, *options, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
        ]

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert [lab.wait(process) for process in start(whole)] == [0, 0], said(whole)
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        before = begun(folder)
        processes = start(folder)
        wait_for(lambda before=before: begun(folder) > before, 120)
        time.sleep(lab.rng.uniform(0, 1))
        asked = processes if signum == signal.SIGKILL else [lab.rng.choice(processes)]
        if any(map(over, processes)):
            break
        for process in asked:
            lab.kill(process, signum)
        statuses = sorted(lab.wait(process) for process in processes)
        if statuses == [1, STATUS[signum]]:
            assert "stopped by SIGTERM before training" in said(folder)
            assert "error: another process of the run has ended" in said(folder)
        else:
            assert statuses == [STATUS[signum]] * 2, said(folder)
        assert "Traceback" not in said(folder)
    assert [lab.wait(process) for process in start(folder)] == [0, 0], said(folder)
    same_run(folder, whole)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
