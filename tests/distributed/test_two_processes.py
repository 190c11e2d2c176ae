"""Two processes train as one does: the same losses, monitors, checkpoints and export, by DDP and sharded.

Everything is asked of runs of `spl fit` that a single child process makes (see two_processes.py); what is expected is
what the run of one process says, whose step sees the same examples.
"""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spl.checkpoints import read
from spl.models import load_model, load_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, HALF = 20, 10
BOTH = [f"{kind}-{data}" for kind in ("lora", "full") for data in ("even", "uneven")]


def write_models(folder: Path) -> None:
    """The tiny model as files, its embeddings tied and untied; its 263 tokens are no even number of rows."""
    load_model("tiny").save_pretrained(folder / "tied")
    config = load_model("tiny").config
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    type(load_model("tiny"))(config).save_pretrained(folder / "untied")
    for name in ("tied", "untied"):
        load_tokenizer("tiny").save_pretrained(folder / name)


def write_pairs(path: Path) -> None:
    """27 pairs, no number that two processes share; the longest prompt is many times the shortest."""
    draw = random.Random(0)
    with path.open("w") as file:
        for k in range(27):
            size = int(200 ** draw.uniform(0.4, 0.95)) // 3
            texts = ["".join(draw.choices("abcdefgh ", k=size)) for _ in range(3)]
            row = {"prompt": f"{k} {texts[0]}", "chosen": f"y{texts[1]}", "rejected": f"n{texts[2]}"}
            file.write(json.dumps(row) + "\n")


def settings(folder: Path) -> dict[str, Any]:
    """Every run, by name."""
    plain = ["--config", str(CONFIGS / "experiment" / "tiny.yaml"), "--trainer.max_steps", str(STEPS)]
    plain += ["--model.dtype", "float32", "--reference.cache", str(folder / "cache")]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    several = {name: ["--trainer", str(CONFIGS / "trainer" / f"{name}.yaml"), *cpu] for name in ("ddp", "fsdp")}
    kinds = {"lora": ["--model.lora_rank", "4"], "full": ["--model.lora_rank", "0", "--model.lr", "1e-3"]}
    pairs = ["--data.path", str(folder / "pairs.jsonl"), "--data.val_path", "null", "--data.max_tokens", "300"]
    data = {
        "even": ["--model.model", str(folder / "tied")],
        "uneven": ["--model.model", str(folder / "untied"), *pairs, "--export.format", "none"],
    }
    monitors = ["--config", str(CONFIGS / "callbacks" / "monitor.yaml"), "--samples.every_n_steps", str(STEPS)]
    monitors += ["--samples.num_prompts", "3", "--samples.num_samples", "2", "--samples.max_new_tokens", "6"]
    saved = ["--checkpoint.every_n_train_steps", str(HALF), "--checkpoint.keep", "9"]
    one, two = ["--data.batch_size", "6"], ["--data.batch_size", "3"]
    runs = {}
    for name in BOTH:
        kind, rows = name.split("-")
        base = plain + kinds[kind] + data[rows]
        watched = monitors + saved if name == "full-even" else []
        runs[f"one-{name}"] = {"processes": 1, "args": base + one + watched}
        runs[f"ddp-{name}"] = {"processes": 2, "args": base + two + several["ddp"]}
        runs[f"fsdp-{name}"] = {"processes": 2, "args": base + two + several["fsdp"] + watched}
    full = plain + kinds["full"] + data["even"]
    accumulated = ["--trainer.accumulate_grad_batches", "3", "--data.batch_size", "1", "--data.group_by_length", "true"]
    own_copy = ["--reference.cache", "none", "--model.gradient_checkpointing", "true", *accumulated]
    runs["fsdp-accumulated"] = {"processes": 2, "args": full + several["fsdp"] + own_copy}
    offload = [f"--trainer.strategy.init_args.{name}" for name in ("cpu_offload=true", "reshard_after_forward=false")]
    runs["fsdp-plain"] = {
        "processes": 2,
        "args": full + several["fsdp"] + two + offload + ["--model.scorer", "plain", "--export.format", "none"],
    }
    after = {
        "fsdp-from-fsdp": (2, several["fsdp"] + two + monitors, "fsdp-full-even"),
        "one-from-fsdp": (1, one, "fsdp-full-even"),
        "ddp-from-fsdp": (2, several["ddp"] + two, "fsdp-full-even"),
    }
    for name, (processes, more, start) in after.items():
        checkpoint = ["--ckpt_path", str(folder / start / "checkpoints" / f"step={HALF}.ckpt")]
        runs[name] = {"processes": processes, "args": full + more + checkpoint}
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_models(folder)
    write_pairs(folder / "pairs.jsonl")
    (folder / "runs.json").write_text(json.dumps(settings(folder)))
    script = Path(__file__).with_name("two_processes.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600, env=env
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def seen(folder: Path, name: str) -> list[dict[str, list[Any]]]:
    """What each process of a run saw."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.[0-9].json"))]


def losses(folder: Path, name: str) -> list[float]:
    """The mean loss of each step's examples, over all micro-batches of all processes."""
    total, count = defaultdict[int, float](float), defaultdict[int, int](int)
    for process in seen(folder, name):
        for step, loss, examples in zip(process["steps"], process["losses"], process["examples"], strict=True):
            total[step] += loss * examples
            count[step] += examples
    return [total[step] / count[step] for step in sorted(total)]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digest(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / name / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_losses_are_those_of_one_process(runs: Path, strategy: str, name: str) -> None:
    one, two = losses(runs, f"one-{name}"), losses(runs, f"{strategy}-{name}")
    assert len(one) == STEPS
    assert one[0] - min(one) > 0.1  # it learns
    assert two == pytest.approx(one, abs=1e-5, rel=0)
    assert len(seen(runs, f"{strategy}-{name}")) == 2
    if name.endswith("uneven"):
        assert len({tuple(process["examples"]) for process in seen(runs, f"{strategy}-{name}")}) == 2


@pytest.mark.parametrize("name", ["ddp-full-even", "fsdp-full-even"])
def test_logged_figures_of_training_are_over_all_processes(runs: Path, name: str) -> None:
    one, two = ([row for row in rows(runs / run) if row["train/loss"]] for run in ("one-full-even", name))
    assert len(one) == len(two) == STEPS
    for figure in ("train/loss", "train/rewards/margins", "train/rewards/accuracies", "train/token_entropy"):
        found = [float(row[figure]) for row in two]
        assert found == pytest.approx([float(row[figure]) for row in one], abs=1e-4), figure


def test_accumulation_reduces_once_a_step(runs: Path) -> None:
    """A group a decoder layer, of which there are two, and the root's."""
    for process in seen(runs, "fsdp-accumulated"):
        assert process["reductions"] == [0, 0, 3] * STEPS
    assert losses(runs, "fsdp-accumulated") == pytest.approx(losses(runs, "one-full-even"), abs=1e-5, rel=0)


def test_padded_scoring_and_weights_in_the_cpus_memory_change_nothing(runs: Path) -> None:
    """The processes have unequal numbers of responses, and so of rows to pad."""
    assert losses(runs, "fsdp-plain") == pytest.approx(losses(runs, "one-full-even"), abs=1e-5, rel=0)


def test_adapters_alone_are_reduced(runs: Path) -> None:
    for process in seen(runs, "fsdp-lora-even"):
        assert process["reductions"] == [2] * STEPS


def test_monitors_see_what_they_see_in_one_process(runs: Path) -> None:
    one, two = (json.loads((runs / name / "summary.json").read_text()) for name in ("one-full-even", "fsdp-full-even"))
    for end in ("start", "end"):
        assert one[end].keys() == two[end].keys()
        assert {"val/loss", "val/entropy", "val/kl", "val/ece", "val/distinct_2"} <= one[end].keys()
        for name, value in one[end].items():
            assert two[end][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), (end, name)
    lines = [(runs / name / "samples.jsonl").read_text().splitlines() for name in ("one-full-even", "fsdp-full-even")]
    assert lines[0][:3] == lines[1][:3]


def test_one_reference_cache_serves_one_process_and_many(runs: Path) -> None:
    """The fingerprint of a sharded model is that of the model: one folder for each of the two models."""
    assert len(list((runs / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", BOTH)
def test_weights_are_read_in_slices(runs: Path, name: str) -> None:
    assert "loads the whole" not in (runs / f"fsdp-{name}" / "log.txt").read_text()


def test_a_resumed_run_ends_bit_for_bit_as_the_straight_one(runs: Path) -> None:
    assert digest(runs, "fsdp-from-fsdp") == digest(runs, "fsdp-full-even")
    assert losses(runs, "fsdp-from-fsdp") == losses(runs, "fsdp-full-even")[HALF:]


@pytest.mark.parametrize("name", ["one-from-fsdp", "ddp-from-fsdp"])
def test_others_go_on_from_a_sharded_run(runs: Path, name: str) -> None:
    assert losses(runs, name) == pytest.approx(losses(runs, "one-full-even")[HALF:], abs=1e-5, rel=0)


def test_a_sharded_run_saves_the_checkpoint_of_one_process(runs: Path) -> None:
    one, two = (read(runs / name / "checkpoints" / f"step={HALF}.ckpt") for name in ("one-full-even", "fsdp-full-even"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, atol=1e-4, rtol=1e-3)
    states = [saved["optimizer_states"][0] for saved in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, moments in states[0]["state"].items():
        assert {k: v.shape for k, v in moments.items()} == {k: v.shape for k, v in states[1]["state"][number].items()}


def test_the_export_is_the_trained_model(runs: Path) -> None:
    saved = read(runs / "fsdp-full-even" / "checkpoints" / "last.ckpt")["state_dict"]
    exported = load_file(runs / "fsdp-full-even" / "export" / "model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(saved[f"policy.{name}"], weight), name
