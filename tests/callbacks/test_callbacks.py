"""Callbacks that only read: the report, the progress bar's names, the rate, the metrics file."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from spl.callbacks.export import Export
from spl.callbacks.progress import ProgressBar
from spl.callbacks.run_folder import MetricsLogger
from spl.callbacks.start import StartEndValidation, StartReport
from spl.callbacks.throughput import ThroughputMonitor
from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule


def fit(folder: Path, *callbacks: Callback, steps: int = 3, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks),
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0,
        log_every_n_steps=1, **{"logger": False, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    module = PreferenceModule("tiny", alpha=1.0, beta=0.1, lora_rank=4)
    trainer.fit(module, PreferenceDataModule("survey", val_path="survey"))
    return trainer


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
    def write(resume: bool, steps: range, **extra: float) -> None:
        logger = MetricsLogger(tmp_path, resume=resume)
        for step in steps:
            logger.log_metrics({"loss": float(step), **extra}, step)
            logger.save()

    write(False, range(5))
    write(True, range(3, 6), margin=1.0)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["loss"]), r["margin"]) for r in rows] == [
        (0, 0.0, ""), (1, 1.0, ""), (2, 2.0, ""), (3, 3.0, "1.0"), (4, 4.0, "1.0"), (5, 5.0, "1.0")
    ]  # fmt: skip
    write(False, range(1))
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7


def test_the_progress_bar_shows_loss_margin_accuracy_and_rate(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ThroughputMonitor())
    shown = ProgressBar().get_metrics(trainer, trainer.lightning_module)
    assert {"step", "loss", "margin", "accuracy", "tokens/s"} <= shown.keys()
    assert shown["step"] == "3/3"
    assert float(shown["tokens/s"].replace(",", "")) > 0


def test_the_rate_counts_distinct_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("spl.callbacks.throughput.time.perf_counter", lambda: float(next(ticks)))
    monitor = ThroughputMonitor()
    trainer = fit(tmp_path, monitor, limit_val_batches=0)
    batch = trainer.datamodule.first_batch()  # type: ignore[attr-defined]
    # One second a batch by this clock, and every batch is the whole survey.
    assert trainer.callback_metrics["train/tokens_per_second"].item() == batch.num_tokens


def test_no_export_where_none_is_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, Export("none"))
    assert not (tmp_path / "export").exists()


def test_an_adapter_export(tmp_path: Path) -> None:
    fit(tmp_path, Export("adapter"))
    assert (tmp_path / "export" / "adapter_model.safetensors").is_file()
