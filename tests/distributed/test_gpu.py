"""The same on CUDA, over all GPUs of the machine; `make test-gpu` runs it. What is expected is one GPU's own run."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spl.models import load_model, load_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 20
SHARDED = ["--trainer", str(CONFIGS / "trainer" / "fsdp.yaml")]
OPTION = "--trainer.strategy.init_args."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model as files, which shards are read from."""
    folder = tmp_path_factory.mktemp("model")
    load_model("tiny").save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def losses(folder: Path, *args: str, devices: int = 0) -> list[float]:
    """Held-out losses of a run in a process of its own, which sees the same examples a step on any number of GPUs.

    The survey's 8 questions: a step has all of them on 1, 2, 4 or 8 GPUs.
    """
    devices = devices or max(k for k in (1, 2, 4, 8) if k <= torch.cuda.device_count())
    command = [
        *("fit", "--config", str(CONFIGS / "experiment" / "tiny.yaml"), *args, "--output", str(folder)),
        *("--trainer.accelerator", "gpu", "--trainer.devices", str(devices), "--data.batch_size", str(8 // devices)),
        *("--trainer.max_steps", str(STEPS), "--trainer.check_val_every_n_epoch", "1"),
        *("--reference.cache", "none", "--trainer.enable_progress_bar", "false"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "spl.cli", *command], capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-6000:]
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


@pytest.mark.parametrize("rank", ["0", "4"], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sharded_runs_trace_the_run_of_one_gpu(tmp_path: Path, model: str, rank: str, precision: str) -> None:
    given = ["--model.model", model, "--model.lora_rank", rank, "--model.lr", "1e-3"]
    options = ["--trainer.precision", precision, "--model.attention", "sdpa"]
    one = losses(tmp_path / "one", *given, *options, devices=1)
    many = losses(tmp_path / "many", *SHARDED, *given, *options)
    assert one[0] - one[-1] > 0.05
    assert many == pytest.approx(one, abs=1e-4 if precision == "32-true" else 2e-2)
    hashes = json.loads((tmp_path / "many" / "summary.json").read_text())["hashes"]
    assert list(hashes) == ["export/model.safetensors"]


@pytest.mark.parametrize(
    "more",
    [
        [f"{OPTION}cpu_offload", "true"],
        [f"{OPTION}reshard_after_forward", "false"],
        ["--model.gradient_checkpointing", "true"],
        ["--model.compile_blocks", "true"],
        ["--model.compile_blocks", "true", "--model.gradient_checkpointing", "true"],
        ["--model.attention", "flex"],
    ],
    ids=["offload", "kept", "checkpointing", "compiled", "compiled-checkpointing", "flex"],
)
def test_what_saves_memory_or_time_changes_no_loss(tmp_path: Path, model: str, more: list[str]) -> None:
    given = ["--model.model", model, "--model.lora_rank", "0", "--model.lr", "1e-3", "--trainer.precision", "32-true"]
    plain = losses(tmp_path / "plain", *SHARDED, *given)
    assert losses(tmp_path / "more", *SHARDED, *given, *more) == pytest.approx(plain, abs=1e-3)


def test_monitors_and_resuming(tmp_path: Path, model: str) -> None:
    monitors = ["--config", str(CONFIGS / "callbacks" / "monitor.yaml"), "--samples.num_prompts", "8"]
    monitors += [
        "--samples.num_samples",
        "2",
        "--samples.max_new_tokens",
        "8",
        "--checkpoint.every_n_train_steps",
        "10",
    ]
    given = ["--model.model", model, "--model.lora_rank", "0", "--checkpoint.keep", "9", *SHARDED]
    straight = losses(tmp_path / "a", *monitors, *given)
    checkpoint = ["--ckpt_path", str(tmp_path / "a" / "checkpoints" / "step=10.ckpt")]
    again = losses(tmp_path / "b", *monitors, *given, *checkpoint)
    assert again == pytest.approx(straight[-len(again) :], abs=1e-6)
    assert (tmp_path / "a" / "samples.jsonl").is_file()
