"""The calibration monitor in a run: its figures against the step's own numbers, the letters, the picture, a resume."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.run_folder import MetricsLogger
from spl.callbacks.start import StartEndValidation
from spl.data.base import PreferenceDataModule
from spl.data.collate import collate
from spl.modules.base import PolicyModule
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.types import PreferenceBatch


class Seen(Callback):
    """Logits and shares of every held-out comparison, as the monitor should see them."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, *args: Any
    ) -> None:
        logps = outputs["policy_logps"].tolist()
        margins = outputs["margins"].tolist() if "margins" in outputs else [0.0] * len(batch.shares)
        for (i, j), share, margin in zip(batch.comparisons.tolist(), batch.shares.tolist(), margins, strict=True):
            self.rows.append((margin, logps[i] - logps[j], share))

    def both_ways(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.tensor([row[column] for row in self.rows]).double().sigmoid()
        s = torch.tensor([row[2] for row in self.rows]).double()
        return torch.cat([p, 1 - p]), torch.cat([s, 1 - s])


class Quiz(PreferenceDataModule):
    """The survey's questions as multiple choice: the most popular answer, which is always listed first, is right."""

    def choice_batches(self) -> Iterator[tuple[PreferenceBatch, list[int]]]:
        assert self.val is not None
        for chosen in ([0, 1, 2], [3], [4, 5, 6, 7]):
            batch = collate([self.val[k] for k in chosen])
            yield batch._replace(comparisons=batch.comparisons[:0], shares=batch.shares[:0]), [0] * len(chosen)


class EmptyQuiz(PreferenceDataModule):
    def choice_batches(self) -> Iterator[tuple[PreferenceBatch, list[int]]]:
        yield from ()


def trainer(folder: Path, *callbacks: Callback, steps: int = 3, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks),
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
        check_val_every_n_epoch=1000, **{"logger": False, "num_sanity_val_steps": 0, **options},
    )  # fmt: skip


def preference() -> PreferenceModule:
    torch.manual_seed(0)
    return PreferenceModule("tiny", alpha=1.0, beta=0.1, lora_rank=4, lr=5e-3)


def values(run: Trainer, prefix: str = "val/") -> dict[str, float]:
    return {k.removeprefix(prefix): v.item() for k, v in run.callback_metrics.items() if k.startswith(prefix)}


def hard_rows(folder: Path, ties: int = 0) -> str:
    """Pairs with a preferred side, and ties, as a crowd file."""
    rows = [
        {"prompt": f"Number {k}?", "responses": [f"{k}", f"{7 * k % 10}x"], "comparisons": [[0, 1, share]]}
        for k, share in enumerate([1.0] * 7 + [0.0] * 3 + [0.5] * ties)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(("column", "prefix"), [(0, ""), (1, "generative_")])
def test_figures_are_of_the_steps_own_numbers(tmp_path: Path, column: int, prefix: str) -> None:
    seen = Seen()
    run = trainer(tmp_path, CalibrationMonitor(), seen)
    run.validate(preference(), PreferenceDataModule("survey", val_path="survey", batch_size=3), verbose=False)
    found, (p, s) = values(run), seen.both_ways(column)
    assert len(p) == 2 * 22
    expected_ece = sum(
        (p[b] - s[b]).sum().abs().item() for k in range(15) if (b := (p * 15).floor() == k).any()
    ) / len(p)  # fmt: skip
    assert found[f"{prefix}ece"] == pytest.approx(expected_ece, abs=1e-6)
    assert found[f"{prefix}brier"] == pytest.approx((2 * (s * (1 - p) ** 2 + (1 - s) * p**2)).mean().item())
    losses = -(s * p.log() + (1 - s) * (1 - p).log())
    assert found[f"{prefix}log_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found[f"{prefix}share_gap"] == pytest.approx((p - s).abs().mean().item())
    correlation = torch.corrcoef(torch.stack([p, s]))[0, 1].item()
    assert found[f"{prefix}share_correlation"] == pytest.approx(correlation, abs=1e-6)


def test_hard_labels_and_ties(tmp_path: Path) -> None:
    seen = Seen()
    run = trainer(tmp_path, CalibrationMonitor(), seen)
    run.validate(preference(), PreferenceDataModule("survey", val_path=hard_rows(tmp_path, ties=2)), verbose=False)
    found = values(run)
    assert not {"share_gap", "generative_share_correlation"} & found.keys()
    p, s = seen.both_ways(1)
    raters = torch.cat([p, p]), torch.cat([(s > 0).long(), (s == 1).long()])  # two raters; a tie has one on each side
    assert found["generative_ece"] == pytest.approx(binary_calibration_error(*raters, n_bins=15).item(), abs=1e-6)
    assert found["generative_brier"] == pytest.approx(2 * brier_score_loss(raters[1].numpy(), raters[0].numpy()))
    assert found["generative_log_loss"] == pytest.approx(log_loss(raters[1].numpy(), raters[0].numpy()), rel=1e-5)


def test_letters(tmp_path: Path) -> None:
    module = preference()
    run = trainer(tmp_path, CalibrationMonitor())
    data = Quiz("survey", val_path="survey")
    run.validate(module, data, verbose=False)
    found = values(run)
    probabilities = []
    for k in range(8):  # each question by itself
        with torch.no_grad():
            probabilities.append(module.score(collate([data.val[k]])).logps.double().softmax(0))
    right = [p.argmax().item() == 0 for p in probabilities]
    assert found["choice_accuracy"] == pytest.approx(sum(right) / 8)
    assert found["choice_log_loss"] == pytest.approx(-sum(p[0].log().item() for p in probabilities) / 8, rel=1e-4)
    briers = [((1 - p[0]) ** 2 + (p[1:] ** 2).sum()).item() for p in probabilities]
    assert found["choice_brier"] == pytest.approx(sum(briers) / 8, rel=1e-4)
    confidences = torch.stack([p.max() for p in probabilities])
    expected = binary_calibration_error(confidences.float(), torch.tensor(right).int(), n_bins=15).item()
    assert found["choice_ece"] == pytest.approx(expected, abs=1e-4)


def test_no_letters_where_no_question_is_given(tmp_path: Path) -> None:
    monitor = CalibrationMonitor()
    run = trainer(tmp_path, monitor)
    run.validate(preference(), EmptyQuiz("survey", val_path="survey"), verbose=False)
    assert "ece" in values(run)
    assert not monitor.first  # no run has started
    assert not any(name.startswith("choice_") for name in values(run))


def test_figures_stand_in_the_row_of_the_loss(tmp_path: Path) -> None:
    monitor = CalibrationMonitor()
    run = trainer(
        tmp_path, StartEndValidation(), monitor, logger=MetricsLogger(tmp_path), num_sanity_val_steps=2, steps=4
    )
    run.fit(preference(), Quiz("survey", val_path="survey"))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    names = [
        f"val/{prefix}{name}"
        for prefix in ("", "generative_", "choice_")
        for name in ("ece", "ece_equal_mass", "brier", "log_loss")
    ]
    assert len(rows) == 2
    assert all(row[name] for row in rows for name in names)
    # The same weights, whole: what the sanity check saw has left nothing behind.
    start = trainer(tmp_path / "start", CalibrationMonitor())
    start.validate(preference(), Quiz("survey", val_path="survey"), verbose=False)
    assert float(rows[0]["val/ece"]) == pytest.approx(values(start)["ece"], abs=1e-6)
    assert rows[0]["val/ece"] != rows[1]["val/ece"]
    assert (tmp_path / "figures" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert (monitor.first_step, set(monitor.first)) == (0, {"", "generative_", "choice_"})


def test_the_picture_shows_the_start_beside_the_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("spl.callbacks.calibration.log_figure", lambda trainer, name, figure: drawn.append(figure))
    run = trainer(tmp_path, StartEndValidation(), CalibrationMonitor(), num_sanity_val_steps=2)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"))
    legends = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in drawn]
    assert legends == [["step 0"], ["step 0", "step 3"]]
    implicit = drawn[-1].axes[0]
    points = implicit.collections[-1].get_offsets()
    # Every comparison counts both ways, so the curve is symmetric about (1/2, 1/2).
    assert (points + points[::-1]).ravel().tolist() == pytest.approx([1.0] * 2 * len(points))
    assert all("n = 22" in figure.axes[0].get_title() for figure in drawn)  # not those of the sanity check besides


def test_the_start_survives_a_resume(tmp_path: Path) -> None:
    monitor = CalibrationMonitor()
    run = trainer(tmp_path, StartEndValidation(), monitor)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CalibrationMonitor()
    run = trainer(tmp_path, StartEndValidation(), again, steps=5)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"), ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.first == monitor.first
    assert again.first_step == 0
    assert sum(again.first[""][0]) == pytest.approx(22)


def test_the_tests_names(tmp_path: Path) -> None:
    run = trainer(tmp_path, CalibrationMonitor())
    run.test(preference(), Quiz("survey", val_path="survey"), verbose=False)
    assert {"ece", "generative_brier", "choice_accuracy"} <= values(run, "test/").keys()
    assert not (tmp_path / "figures").exists()


def test_a_module_without_margins(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: PolicyModule = SFTModule("tiny", lora_rank=4)
    seen = Seen()
    run = trainer(tmp_path, CalibrationMonitor(), seen)
    run.validate(module, PreferenceDataModule("survey", val_path="survey"), verbose=False)
    assert "ece" not in values(run)
    p, s = seen.both_ways(1)
    assert values(run)["generative_share_gap"] == pytest.approx((p - s).abs().mean().item())
