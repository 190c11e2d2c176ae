"""Callbacks that only read: the report, the progress bar's names, the rate, the metrics file."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from tiny_fit import fit

from spl.callbacks.export import Export
from spl.callbacks.progress import ProgressBar
from spl.callbacks.record import log_now
from spl.callbacks.run_folder import MetricsLogger, RunFolder
from spl.callbacks.run_logs import rewind
from spl.callbacks.start import StartEndValidation, StartReport
from spl.callbacks.throughput import ThroughputMonitor
from spl.modules.preference import PreferenceModule


def test_the_report_says_what_will_happen(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with caplog.at_level("INFO", logger="spl"):
        fit(tmp_path, StartReport())
    report = capsys.readouterr().out
    for expected in (
        "alpha 1, beta 0.1, alpha/beta 10",
        "the policy with its adapters off",
        "8,192 of 99,072 parameters (LoRA r=4",
        "8 examples",
        "3 steps",
        "«Coffee<|end|>»",
        str(tmp_path)[:40],
    ):
        assert expected in report
    assert "Expected first loss" in caplog.text
    assert "policy and reference agree to 0 nats" in caplog.text
    assert "The longest batch ran" in caplog.text


def test_the_expected_first_loss_is_the_first_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses: list[float] = []

    class First(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            losses.append(outputs["objective"].item())

    with caplog.at_level("INFO", logger="spl"):
        fit(tmp_path, StartReport(), First())
    said = next(r.message for r in caplog.records if "Expected first loss" in r.message)
    assert f"{losses[0]:.4f}" in said


def test_the_check_runs_in_the_precision_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    check = PreferenceModule.start_check

    def start_check(module: PreferenceModule, batch: Any) -> Any:
        found.append(torch.is_autocast_enabled("cpu"))
        return check(module, batch)

    monkeypatch.setattr(PreferenceModule, "start_check", start_check)
    for precision in ("32-true", "bf16-mixed"):
        fit(tmp_path, StartReport(check_longest=False), steps=1, precision=precision)
    assert found == [False, True]


def test_the_check_of_the_longest_batch_changes_nothing(tmp_path: Path) -> None:
    losses = [
        fit(tmp_path, *callbacks, logger=MetricsLogger(tmp_path / str(k))).callback_metrics["train/loss"].item()
        for k, callbacks in enumerate(([], [StartReport()], [StartReport(check_longest=False)]))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_validation_frames_the_run(tmp_path: Path) -> None:
    fit(tmp_path, StartEndValidation(), steps=3, check_val_every_n_epoch=100, logger=MetricsLogger(tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    validated = [int(row["step"]) for row in rows if row["val/loss"]]
    assert (min(validated), len(validated)) == (0, 2)
    assert max(validated) >= 2


def test_the_metrics_file_is_added_to(tmp_path: Path) -> None:
    def write(steps: range, **extra: float) -> None:
        logger = MetricsLogger(tmp_path)
        for step in steps:
            logger.log_metrics({"loss": float(step), **extra}, step)
            logger.save()

    write(range(2))
    write(range(2, 4), margin=1.0)
    write(range(4, 5))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["loss"]), r["margin"]) for r in rows] == [
        (0, 0.0, ""), (1, 1.0, ""), (2, 2.0, "1.0"), (3, 3.0, "1.0"), (4, 4.0, "")
    ]  # fmt: skip


def test_logs_are_cut_back_and_nothing_else(tmp_path: Path) -> None:
    for name in ("samples.jsonl", "pairs.jsonl", "pairs.csv"):
        (tmp_path / name).write_text("one\ntwo\n")
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n1,0.5\n2,0.")
    rewind(tmp_path, {"metrics.csv": 1, "samples.jsonl": 4})
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,1.0\n"
    assert (tmp_path / "samples.jsonl").read_text() == "one\n"
    rewind(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv", "pairs.jsonl"]
    assert (tmp_path / "pairs.jsonl").read_text() == "one\ntwo\n"


def test_the_progress_bar_shows_loss_margin_accuracy_and_rate(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ThroughputMonitor())
    shown = ProgressBar().get_metrics(trainer, trainer.lightning_module)
    assert {"step", "loss", "margin", "accuracy", "tokens/s"} <= shown.keys()
    assert shown["step"] == "3/3"
    assert float(shown["tokens/s"].replace(",", "")) > 0
    assert not {"entropy", "kl"} & shown.keys()


def test_the_progress_bar_shows_what_monitors_said_last(tmp_path: Path) -> None:
    trainer = fit(tmp_path, limit_val_batches=0)
    log_now(trainer, {"val/entropy": 31.5, "val/kl": 0.25})
    shown = ProgressBar().get_metrics(trainer, trainer.lightning_module)
    assert (shown["entropy"], shown["kl"]) == (31.5, 0.25)


def test_a_figure_starts_where_it_is_first_logged(tmp_path: Path) -> None:
    class Monitor(Callback):
        """Logs before step 1, after the run folder has had its turn, and at the end."""

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            log_now(trainer, {"val/kl": 0.0})

        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            log_now(trainer, {"val/kl": 2.0, "val/vendi": 3.0})

    fit(tmp_path, RunFolder(), Monitor(), check_val_every_n_epoch=1, logger=MetricsLogger(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert (summary["start"]["val/kl"], summary["end"]["val/kl"], summary["end"]["val/vendi"]) == (0.0, 2.0, 3.0)
    assert "val/vendi" not in summary["start"]
    assert len(losses) == 3
    assert (summary["start"]["val/loss"], summary["end"]["val/loss"]) == pytest.approx((losses[0], losses[-1]))


def test_no_export_where_none_is_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, Export("none"))
    assert not (tmp_path / "export").exists()


def test_an_adapter_export(tmp_path: Path) -> None:
    fit(tmp_path, Export("adapter"))
    assert (tmp_path / "export" / "adapter_model.safetensors").is_file()
