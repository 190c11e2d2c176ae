"""The door users come through: every command, what it writes, and what it says when something is wrong."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_configs import EXPERIMENTS
from transformers import AutoModelForCausalLM

from spl.checkpoints import peek, read
from spl.cli import COMMANDS, main
from spl.data.survey import SURVEY

TINY = ["--config", str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")]
QUIET = ["--trainer.enable_progress_bar", "false"]


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said of a command that ends in an error."""
    with pytest.raises(SystemExit) as raised:
        main(args)
    return int(raised.value.code or 0), capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    main(["fit", *TINY, *QUIET, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with every monitor."""
    folder = tmp_path_factory.mktemp("runs") / "monitored"
    monitor = str(Path(TINY[1]).parents[1] / "callbacks/monitor.yaml")
    main(["fit", *TINY, "--config", monitor, *QUIET, "--output", str(folder), "--samples.max_new_tokens", "16"])
    return folder


def test_monitors_write_their_figures(monitored: Path) -> None:
    with (monitored / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sums = ("entropy", "cross_entropy", "kl")
    scores = ("ece", "ece_equal_mass", "brier", "log_loss")
    names = [*sums, *(f"{n}_per_token" for n in sums), *scores, *(f"generative_{n}" for n in scores)]
    names += ["distinct_2", "length", "eos_rate", "truncation_rate", "rewards/accuracies", "rewards/margins"]
    names += ["share_gap", "generative_share_correlation", "self_bleu", "token_entropy", "forecast_log_z"]
    for name in names:
        values = [float(row[f"val/{name}"]) for row in rows if row[f"val/{name}"]]
        assert values and all(math.isfinite(value) for value in values), name
    for row in rows:
        if row["val/kl"]:
            parts = [float(row[f"val/{name}"]) for name in ("kl", "cross_entropy", "entropy")]
            assert parts[0] == pytest.approx(parts[1] - parts[2], abs=1e-3)
    train = [row for row in rows if row["train/loss"]]
    assert all(float(row["train/grad_norm"]) > 0 for row in train)
    names = ["tokens_per_second", "padded_tokens_per_second", "peak_share", "memory_gib"]
    assert any(all(row[f"train/{name}"] for name in names) for row in train)


def test_monitors_draw_and_show_samples(monitored: Path) -> None:
    pictures = {path.name for path in (monitored / "figures").iterdir()}
    assert pictures == {"entropy.png", "calibration.png", "diversity.png", "rewards.png"}
    steps = [json.loads(line)["step"] for line in (monitored / "samples.jsonl").read_text().splitlines()]
    assert steps == [0] * 6 + [20] * 6
    events = EventAccumulator(str(monitored / "tensorboard"), size_guidance={"images": 0}).Reload().Tags()
    assert {"entropy", "calibration", "diversity", "rewards"} <= set(events["images"])
    assert "samples/text_summary" in events["tensors"]
    assert {"val/entropy", "val/ece", "train/grad_norm"} <= set(events["scalars"])


def test_the_end_of_a_run_is_told(monitored: Path) -> None:
    found = json.loads((monitored / "summary.json").read_text())
    assert found["start"]["val/kl"] == 0 < found["end"]["val/kl"]
    assert found["start"]["val/entropy"] == found["end"]["val/reference_entropy"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"spl {command}" in text for command in COMMANDS)
    assert "configs/experiment/tiny.yaml" in text


def test_fit_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    for setting in ("--model.alpha", "--model.beta", "--data.path", "--output", "--resume", "--export.format"):
        assert setting in text
    assert "entropy coefficient" in text


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_on_the_tiny_model(path: Path, tmp_path: Path) -> None:
    tiny = ["--model.model", "tiny", "--data.path", "survey", "--data.val_path", "survey", "--data.val_size", "0"]
    tiny += ["--data.batch_size", "4", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(path), *tiny, *QUIET, "--output", str(tmp_path), "--trainer.fast_dev_run", "2"])
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ["--model.dtype", "bfloat16"],
        ["--trainer.precision", "bf16-mixed"],
        ["--model.gradient_checkpointing", "true"],
        ["--model.lora_rank", "0"],
        ["--model.lora_rank", "0", "--model.dtype", "bfloat16", "--model.gradient_checkpointing", "true"],
        ["--model.scorer", "plain"],
        ["--model.beta", "0"],
        ["--model.lora_targets", "q_proj", "--export.format", "adapter"],
        ["--data.streaming", "true"],
    ],
    ids=lambda options: " ".join(options),
)
def test_a_setting_trains_and_exports(tmp_path: Path, options: list[str]) -> None:
    main(["fit", *TINY, *QUIET, "--output", str(tmp_path / "run"), "--trainer.max_steps", "12", *options])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["end"]["val/loss"] < summary["start"]["val/loss"]
    assert len(summary["hashes"]) == 1


def test_two_processes_train_what_one_does(run: Path, tmp_path: Path) -> None:
    options = [
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--data.batch_size",
        "4",
        "--export.format",
        "none",
    ]
    command = [sys.executable, "-m", "spl.cli", "fit", *TINY, *QUIET, *options, "--output", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.DEVNULL)
    one, two = (read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (run, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    ends = [json.loads((folder / "summary.json").read_text())["end"] for folder in (run, tmp_path / "two")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


def test_a_run_folder_holds_everything(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "export", "log.txt", "metrics.csv", "summary.json", "tensorboard"
    }  # fmt: skip
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["start"]["val/loss"] == pytest.approx(losses[0], abs=1e-5)
    assert summary["end"]["val/loss"] < summary["start"]["val/loss"]
    assert summary["end"]["val/rewards/num"] == 21
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["alpha"] == 1.0


def test_the_export_is_the_trained_model(run: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    start = AutoModelForCausalLM.from_config(exported.config)
    assert {name for name, _ in exported.named_parameters()} == {name for name, _ in start.named_parameters()}
    assert "within" in (run / "log.txt").read_text()


def test_the_config_of_a_run_runs_again_alike(run: Path, tmp_path: Path) -> None:
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    main(["fit", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")])
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "again"))
    assert one["end"] == two["end"]
    assert one["hashes"] == two["hashes"]


def test_resuming_a_finished_run_says_so_and_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (run / "summary.json", run / "export" / "model.safetensors")}
    main(["fit", *TINY, *QUIET, "--output", str(run), "--resume"])
    assert "is finished: 20 steps" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_checkpoint_of_other_settings(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["validate", *TINY, *QUIET, "--ckpt_path", str(run / "checkpoints/last.ckpt"), "--output", str(tmp_path)]
    status, said = fails([*evaluate, "--model.lora_alpha", "32"], capsys)
    assert status == 2
    assert "model.lora_alpha is 32, but the checkpoint was trained with 16: give the same" in said
    main([*evaluate, "--model.alpha", "0.5"])
    assert "model.alpha is 0.5, but the checkpoint was trained with 1.0" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(run: Path, tmp_path: Path, command: str) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    main([command, *TINY, *QUIET, "--ckpt_path", str(checkpoint), "--output", str(tmp_path)])
    with (tmp_path / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    stage = "val" if command == "validate" else "test"
    end = json.loads((run / "summary.json").read_text())["end"]
    assert float(row[f"{stage}/loss"]) == pytest.approx(end["val/loss"], abs=1e-5)


def test_predictions_are_what_transformers_says(run: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    main(["predict", *TINY, *QUIET, "--ckpt_path", str(checkpoint), "--output", str(tmp_path)])
    table = parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert len(table) == sum(len(question.shares) for question in SURVEY)
    row = next(r for r in table if r["row"] == "survey, row 1" and r["response"] == 1)
    prompt = "<|bos|><|user|>Coffee or tea in the morning? Answer with one word.<|end|><|assistant|>"
    start, ids = len(tiny_tokenizer(prompt)["input_ids"]), tiny_tokenizer(prompt + "Tea<|end|>")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(run / "export")(torch.tensor([ids])).logits[0]
    logps = logits.double().log_softmax(-1)
    expected = sum(logps[k - 1, ids[k]].item() for k in range(start, len(ids)))
    assert row["policy_logp"] == pytest.approx(expected, abs=1e-3)
    assert row["num_tokens"] == len(ids) - start == 4
    assert row["reward"] == pytest.approx(1.0 * row["policy_logp"] - 0.1 * row["reference_logp"], abs=1e-4)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["fti"], "unknown command 'fti': expected one of fit"),
        (["fit", *TINY, "--model.alfa", "1"], "--model.alfa"),
        (["fit", *TINY, "--model.alph", "1"], "--model.alph"),
        (["fit", *TINY, "--model.alpha", "0"], "alpha is the entropy coefficient and must be above 0, but got 0"),
        (["fit", *TINY, "--model.beta", "-1"], "beta is the cross-entropy coefficient and must be 0 or more"),
        (["fit", *TINY, "--model.global_temperature", "2"], "two names of one setting"),
        (["fit", *TINY, "--model.lr", "fast"], "model.lr"),
        (["fit", *TINY, "--data.path", "nowhere.jsonl"], "no file or folder 'nowhere.jsonl'"),
        (["fit", *TINY, "--model.model", "nobody/nothing"], "cannot load 'nobody/nothing'"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", *TINY, "--resume"], "--resume needs --output DIR"),
        (["fit", *TINY, "--trainer.default_root_dir", "here"], "give --output instead"),
        (["fit", *TINY, "--data.val_path", "null", "--data.val_split", "x"], "data.val_split names a split of a Hub"),
        (["fit", *TINY, "--data.val_size", "2"], "data.val_size sets a part apart where no held-out data are named"),
        (["fit", *TINY, "--trainer.accelerator", "gpu"], "gpu"),
        (["fit", *TINY, "--trainer.precision", "bf16-true"], "trainer.precision bf16-true would round the loss"),
        (["fit", *TINY, "--model.lora_targets", "nope"], "model.lora_targets 'nope' does not fit"),
        (
            ["fit", *TINY, "--data.streaming", "true", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"],
            "max_steps",
        ),
        (["predict", *TINY, "--ckpt_path", "nowhere.ckpt"], "no checkpoint 'nowhere.ckpt'"),
        (["validate", *TINY, "--data.val_path", "null"], "there is no held-out data"),
    ],
    ids=lambda value: " ".join(v for v in value if "tiny.yaml" not in v) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = fails(args, capsys)
    assert status == 2
    assert sentence in said
    assert "Traceback" not in said
    assert "usage:" not in said


def test_a_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.csv").read_text()
    status, said = fails(["fit", *TINY, "--output", str(run)], capsys)
    assert status == 2
    assert "holds a run already: go on with it by --resume" in said
    assert (run / "metrics.csv").read_text() == before


def test_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "", "rejected": "b"}\n')
    status, said = fails(["fit", *TINY, "--data.path", str(path), "--output", str(tmp_path / "run")], capsys)
    assert status == 2
    assert f"{path}, row 2" in said
    assert "data.bad_rows" in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_command_says_how_to_go_on_and_does(tmp_path: Path, signum: signal.Signals) -> None:
    folder = tmp_path / "run"
    steps = 400
    command = ["fit", *TINY, *QUIET, "--output", str(folder), "--trainer.max_steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "spl.cli", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "metrics.csv").is_file():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else 75)
    assert f"--output {folder} --resume" in said
    assert "Traceback" not in said
    done = peek(folder / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < done < steps
    main([*command, "--resume"])
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(steps))
    assert not any(math.isnan(float(row["train/loss"])) for row in rows)
