"""Disks that are full, files that are damaged, settings and data that are not what they were."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_runs import Lab, begun, said, same_run, wait_for

from spl.checkpoints import peek, verify


def newest_step(folder: Path) -> int:
    return max(int(peek(path)["global_step"]) for path in folder.glob("checkpoints/step=*.ckpt"))


@pytest.fixture
def stopped(lab: Lab, folder: Path) -> Path:
    """The folder of a run that was killed once it had two checkpoints."""
    process = lab.start(folder)
    wait_for(lambda: len(list(folder.glob("checkpoints/step=*.ckpt"))) == 2, 120)
    lab.kill(process, signal.SIGKILL)
    lab.wait(process)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system of a few MB cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_no_checkpoint_and_no_number(lab: Lab, small_disk: Path, tmp_path: Path) -> None:
    folder, log = small_disk / "run", tmp_path / "run.log"
    process = lab.start(folder, log=log, slow_writes=0.02)
    wait_for(lambda: (folder / "checkpoints/last.ckpt").exists(), 120)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert lab.wait(process) == 1
    text = log.read_text()
    assert "could not be written" in text
    assert "No space left on device" in text
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith("error: ")
    good = newest_step(folder)
    assert 2 <= good < 24
    for path in (folder / "checkpoints").glob("*.ckpt"):
        verify(path)
    filler.unlink()
    assert lab.run(folder, log=log) == 0, log.read_text()
    same_run(folder, lab.reference()[0])


def test_a_folder_that_may_not_be_written_is_told(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "checkpoints").write_text("a file where the folder should be")
    assert lab.run(folder) == 1
    assert "step=24.ckpt could not be written" in said(folder).splitlines()[-1]
    assert "Traceback" not in said(folder)


@pytest.mark.parametrize("fault", ["cut", "changed", "a pickle", "empty"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(lab: Lab, stopped: Path, fault: str) -> None:
    step = newest_step(stopped)
    newest = stopped / f"checkpoints/step={step}.ckpt"
    content = bytearray(newest.read_bytes())
    if fault == "cut":
        content = content[: lab.rng.randrange(9, len(content))]
    elif fault == "changed":
        content[lab.rng.randrange(9, len(content))] ^= 1 << lab.rng.randrange(8)
    elif fault == "empty":
        content = bytearray()
    newest.write_bytes(content)
    if fault == "a pickle":
        torch.save({"state_dict": {}}, newest)
    assert lab.run(stopped) == 0, said(stopped)
    text = (stopped / "log.txt").read_text()
    reason = {"cut": "is not whole", "empty": "is not whole", "changed": "is ", "a pickle": "is a pickle"}[fault]
    assert f"step={step}.ckpt {reason}" in text
    assert f"set aside as step={step}.ckpt.damaged" in text
    same_run(stopped, lab.reference()[0])


def test_without_any_good_checkpoint_the_run_is_not_begun_anew(lab: Lab, stopped: Path) -> None:
    for path in (stopped / "checkpoints").glob("step=*"):
        os.truncate(path, 1000)
    assert lab.run(stopped) == 2
    assert "no checkpoint to go on from" in said(stopped).splitlines()[-1]
    assert begun(stopped) == 1


def test_torn_logs_are_mended(lab: Lab, stopped: Path) -> None:
    with (stopped / "metrics.csv").open("a") as file:
        file.write("9,,0.1234")
    for path in (stopped / "tensorboard").glob("events*"):
        with path.open("ab") as file:
            file.write(b"torn")
    (stopped / "checkpoints/.writing-0123").write_bytes(b"half")
    assert lab.run(stopped) == 0, said(stopped)
    same_run(stopped, lab.reference()[0])


def test_another_setting_is_named_and_wants_a_flag(lab: Lab, stopped: Path) -> None:
    other = ["--model.lr", "0.001", "--trainer.max_steps", "26"]
    assert lab.run(stopped, *other) == 2
    sentence = said(stopped).splitlines()[-1]
    assert all(part in sentence for part in ("model.lr: 0.005 -> 0.001", "trainer.max_steps: 24 -> 26"))
    assert "--allow_changes" in sentence
    assert lab.run(stopped, "--data.num_workers", "0", *other, "--allow_changes") == 0, said(stopped)
    assert "26 steps" in said(stopped)


def test_other_data_are_noticed_and_want_a_flag(lab: Lab, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "{k}?", "chosen": "yes", "rejected": "no"}}' for k in range(16)]
    path.write_text("\n".join(rows))
    options = ["--data.path", str(path), "--data.batch_size", "4", "--export.format", "none"]
    process = lab.start(folder, *options)
    wait_for(lambda: (folder / "checkpoints/last.ckpt").exists(), 120)
    lab.kill(process, signal.SIGTERM)
    assert lab.wait(process) == 75
    path.write_text("\n".join(rows).replace("yes", "yea"))
    assert lab.run(folder, *options) == 2
    assert f"the data of {path} are not those that the run was begun with" in said(folder).splitlines()[-1]
    path.write_text("\n".join(rows))
    other = ["--data.batch_size", "2", "--allow_changes"]
    assert lab.run(folder, *options, *other) == 2
    assert "a step of the run had 4 examples and now has 2" in said(folder).splitlines()[-1]
    halves = [*other, "--trainer.accumulate_grad_batches", "2"]
    assert lab.run(folder, *options, *halves) == 0, said(folder)
