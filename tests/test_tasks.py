"""The other things that `spl fit` trains, from the command line: replies to imitate, and a reward model."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from test_cli import QUIET, fails
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spl.checkpoints import read
from spl.cli import main

RUN = ["--trainer.max_steps", "8", "--trainer.accelerator", "cpu", "--trainer.check_val_every_n_epoch", "8"]
MODEL = ["--model.lr", "5e-3", "--model.lora_rank", "4"]
DATA = ["--data.val_path", "survey"]


def fit(task: str, folder: Path, *options: str) -> Path:
    main(["fit", "--task", task, *RUN, *MODEL, *DATA, *QUIET, "--output", str(folder), *options])
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model's run, with all monitors."""
    monitor = Path(__file__).parents[1] / "configs/callbacks/monitor.yaml"
    return fit("reward", tmp_path_factory.mktemp("runs") / "reward", "--config", str(monitor))


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on conversations, from a config that names its task."""
    folder = tmp_path_factory.mktemp("runs")
    turns = [{"role": ("user", "assistant")[k % 2], "content": f"{k}"} for k in range(4)]
    (folder / "talks.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    settings: dict[str, Any] = {
        "task": "sft", "model": {"gem_temperature": 0.7}, "data": {"path": str(folder / "talks.jsonl")}
    }  # fmt: skip
    (folder / "talks.yaml").write_text(yaml.safe_dump(settings))
    talks = ["--config", str(folder / "talks.yaml"), "--data.val_path", str(folder / "talks.jsonl")]
    main(["fit", *talks, *RUN, *MODEL, *QUIET, "--data.batch_size", "2", "--output", str(folder / "sft")])
    return folder / "sft"


def ends(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["start"], summary["end"]


def test_replies_are_learned(sft: Path) -> None:
    start, end = ends(sft)
    assert end["val/loss"] < start["val/loss"]
    assert end["val/perplexity"] == pytest.approx(math.exp(end["val/loss"]), rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(sft / "export").config.vocab_size == 263
    assert yaml.safe_load((sft / "config.yaml").read_text())["task"] == "sft"
    assert "GEM" not in (sft / "log.txt").read_text()


def test_a_reward_model_is_learned(reward: Path) -> None:
    start, end = ends(reward)
    assert start["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert end["val/loss"] < start["val/loss"] and end["val/rewards/accuracies"] > 0.5
    assert end["val/rewards/num"] == 21 and 0 <= end["val/ece"] <= 1 and "val/generative_ece" not in end
    assert AutoModelForSequenceClassification.from_pretrained(reward / "export").config.num_labels == 1
    said = (reward / "log.txt").read_text()
    assert "No samples are drawn" in said and "Expected first loss: 0.6931" in said
    assert (reward / "figures" / "rewards.png").is_file()


def test_the_config_of_a_run_runs_again_alike(sft: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(sft / "config.yaml"), "--output", str(tmp_path / "again")])
    one, two = (read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (sft, tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(two[name], weight) for name, weight in one.items())


def test_a_checkpoint_is_evaluated_and_predicts(reward: Path, sft: Path, tmp_path: Path) -> None:
    last = [str(folder / "checkpoints" / "last.ckpt") for folder in (reward, sft)]
    checkpoint = ["--ckpt_path", last[0], *MODEL, *QUIET, "--trainer.accelerator", "cpu"]
    main(["test", "--task", "reward", *checkpoint, *DATA, "--output", str(tmp_path / "test")])
    with (tmp_path / "test" / "metrics.csv").open() as file:
        assert float(next(csv.DictReader(file))["test/loss"]) == pytest.approx(ends(reward)[1]["val/loss"], abs=1e-5)
    main(["predict", "--task", "reward", *checkpoint, "--output", str(tmp_path / "predict")])
    rows = parquet.read_table(tmp_path / "predict" / "predictions.parquet").to_pylist()
    assert set(rows[0]) == {"row", "response", "reward"} and len(rows) == 22
    checkpoint[1] = last[1]
    main(["predict", "--config", str(sft / "config.yaml"), *checkpoint, "--output", str(tmp_path / "sft")])
    rows = parquet.read_table(tmp_path / "sft" / "predictions.parquet").to_pylist()
    assert set(rows[0]) == {"row", "response", "policy_logp", "entropy", "num_tokens"} and len(rows) == 8


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["fit", "--task", "dpo"], "task"),
        (["fit", "--task", "sft", "--model.alpha", "1"], "--model.alpha"),
        (["fit", "--task", "reward", "--samples.num_prompts", "1"], "--samples.num_prompts"),
        (["fit", "--task", "reward", *RUN, "--export.format", "adapter"], "a reward model is written whole"),
        (["fit", "--task", "reward", *RUN, "--data.multiple_choice", "mmlu.jsonl"], "a reward model does not write"),
        (["plan", "--task", "sft"], "spl plan knows runs on preferences alone, not the task sft"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = fails(args, capsys)
    assert status == 2 and sentence in said and "Traceback" not in said
