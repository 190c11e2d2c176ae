"""How a run of several processes is started: by Lightning itself, by torchrun, by srun."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from spl.cli import main
from spl.processes import lost_process

TINY = str(Path(__file__).parents[2] / "configs" / "experiment" / "tiny.yaml")


@pytest.mark.parametrize(
    "given",
    [
        {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
    ids=["torchrun", "srun"],
)
def test_processes_from_outside_need_a_folder_that_all_know(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", TINY])
    assert raised.value.code == 2
    assert capsys.readouterr().err.endswith("share one folder, so it needs a name: give --output DIR.\n")


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "ddp_fork"])
def test_another_way_to_launch_or_shard_is_refused(
    tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--trainer.strategy", strategy, "--trainer.devices", "1" if strategy == "fsdp" else "2"]
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", TINY, "--output", str(tmp_path / "run"), *given])
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_one_process_refuses_ends_all_in_its_sentence(tmp_path: Path) -> None:
    args = ["--config", TINY, "--output", str(tmp_path / "run"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "spl.cli", "fit", *args]  # the survey's 8 rows fill no step of 16
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 2
    assert found.stderr.endswith("fewer than the 16 that go into one step: lower data.batch_size.\n")
    assert found.stderr.count("\n") == 1


def test_an_adapter_of_no_adapters_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model.lora_rank", "0", "--export.format", "adapter", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", TINY, "--trainer.logger", "false", *given])
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("error: export.format is adapter, but all weights are trained")


def _meet(rank: int, store: str, said: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.barrier()
    try:
        if rank == 0:
            dist.barrier()
    except RuntimeError as error:
        said.put(lost_process(error))
    finally:
        said.close()
        said.join_thread()
        os._exit(0)


def test_a_process_whose_peer_has_gone_says_so(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    both = [context.Process(target=_meet, args=(rank, str(tmp_path / "store"), said)) for rank in (0, 1)]
    for process in both:
        process.start()
    assert said.get(timeout=60).startswith("another process of the run has ended")
    for process in both:
        process.join(60)
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
