"""The reward monitor in a run, and its histograms against numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer

from spl.callbacks.rewards import RewardMonitor
from spl.callbacks.start import StartEndValidation
from spl.data.base import PreferenceDataModule
from spl.metrics.preference import LIMIT, NUM_CELLS, RewardHistograms, histogram_cell, histogram_edges, quantiles
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.types import PreferenceBatch


class Seen(Callback):
    """Chosen and rejected rewards of every held-out comparison, by hand; ties as listed."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, *args: Any
    ) -> None:
        rewards = outputs["rewards"].tolist()
        for (i, j), share in zip(batch.comparisons.tolist(), batch.shares.tolist(), strict=True):
            chosen, rejected = (i, j) if share >= 0.5 else (j, i)
            self.rows.append((rewards[chosen], rewards[rejected], share))


def trainer(folder: Path, *callbacks: Callback, steps: int = 3, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks),
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, logger=False,
        check_val_every_n_epoch=1000, **{"num_sanity_val_steps": 0, **options},
    )  # fmt: skip


def preference() -> PreferenceModule:
    torch.manual_seed(0)
    return PreferenceModule("tiny", alpha=1.0, beta=0.1, lora_rank=4, lr=5e-3)


def spread_of(chosen: torch.Tensor, rejected: torch.Tensor, decided: torch.Tensor | None = None) -> Any:
    metric = RewardHistograms()
    decided = torch.ones(len(chosen), dtype=torch.bool) if decided is None else decided
    metric.update(chosen, rejected, chosen - rejected, decided)
    return metric.compute()


def test_figures_are_numpys() -> None:
    chosen, rejected = 8 * torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    decided = torch.arange(200) % 5 > 0
    spread = spread_of(chosen, rejected, decided)
    margins = (chosen - rejected).numpy()
    figures = {name: value.item() for name, value in spread.figures.items()}
    assert figures["margins_sd"] == pytest.approx(margins.std(), rel=1e-5)
    assert figures["saturated"] == pytest.approx((np.abs(margins) > 5).mean())
    assert figures["accuracy"] == pytest.approx((margins[decided] > 0).mean())
    assert [figures[n] for n in ("chosen", "rejected", "margins")] == pytest.approx(
        [chosen.numpy().mean(), rejected.numpy().mean(), margins.mean()], rel=1e-4
    )


@given(st.lists(st.floats(-2e4, 2e4), min_size=1, max_size=30))
def test_a_value_lies_in_its_cell(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    cells, edges = histogram_cell(values).numpy(), histogram_edges()
    clamped = values.clamp(-LIMIT, LIMIT).numpy()
    slack = 1e-9 * (1 + np.abs(clamped))
    assert (edges[cells] <= clamped + slack).all()
    assert (clamped <= edges[cells + 1] + slack).all()


def test_histograms_and_quantiles_are_numpys() -> None:
    chosen, rejected = 20 * torch.randn(2, 501, generator=torch.Generator().manual_seed(0)) - 100
    spread = spread_of(chosen, rejected)
    edges = histogram_edges()
    for values, counts in zip((chosen, rejected, chosen - rejected), spread.counts, strict=True):
        expected, _ = np.histogram(values.double().numpy(), edges)
        assert np.abs(np.cumsum(expected) - counts.numpy().cumsum()).max() <= 1  # rounding, one at an edge
        levels = [0.1, 0.25, 0.5, 0.9]
        found = quantiles(counts, levels)
        assert found == pytest.approx(np.quantile(values.numpy(), levels).tolist(), rel=0.02, abs=0.5)


def test_quantiles_of_one_value_are_that_value() -> None:
    spread = spread_of(torch.zeros(7), torch.zeros(7))
    assert quantiles(spread.counts[2], [0.0, 0.5, 1.0]) == pytest.approx([0, 0, 0], abs=1e-3)
    assert spread.counts.shape == (3, NUM_CELLS)
    assert spread.figures["margins_sd"] == 0


def test_two_processes_give_the_whole() -> None:
    chosen, rejected = 8 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    decided = torch.arange(50) % 4 > 0
    states = []
    for part in (slice(None, 13), slice(13, None)):
        metric = RewardHistograms()
        metric.update(chosen[part], rejected[part], (chosen - rejected)[part], decided[part])
        states.append(metric)
    whole = spread_of(chosen, rejected, decided)
    for name in ("counts", "totals"):
        reduce = states[0]._reductions[name]
        setattr(states[1], name, reduce(torch.stack([getattr(s, name) for s in states])))
    merged = states[1].compute()
    assert torch.equal(merged.counts, whole.counts)
    for name, value in whole.figures.items():
        assert merged.figures[name].item() == pytest.approx(value.item()), name


def crowd_file(folder: Path) -> str:
    """Votes of every kind: for the response that is listed first, for the other, and ties."""
    rows = [
        {
            "prompt": f"Number {k}?",
            "responses": [f"{k}", f"{(3 * k + 1) % 10}" + "!" * k],
            "comparisons": [[0, 1, share]],
        }
        for k, share in enumerate([1.0, 0.0, 0.2, 0.5, 0.8, 0.0, 0.0, 0.3])
    ]
    path = folder / "crowd.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_the_monitor_sees_every_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spreads: list[Any] = []
    draw = RewardMonitor._draw
    monkeypatch.setattr(RewardMonitor, "_draw", lambda *given: (spreads.append(given[1]), draw(*given))[1])
    seen, monitor = Seen(), RewardMonitor()
    run = trainer(tmp_path, monitor, seen)
    run.validate(
        preference(), PreferenceDataModule("survey", val_path=crowd_file(tmp_path), batch_size=3), verbose=False
    )
    margins = np.array([chosen - rejected for chosen, rejected, _ in seen.rows])
    decided = np.array([share != 0.5 for _, _, share in seen.rows])
    assert len(margins) == 8
    figures = {name: value.item() for name, value in spreads[0].figures.items()}
    assert figures["margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert figures["chosen"] == pytest.approx(np.mean([chosen for chosen, _, _ in seen.rows]), rel=1e-4)
    assert figures["rejected"] == pytest.approx(np.mean([rejected for _, rejected, _ in seen.rows]), rel=1e-4)
    assert figures["accuracy"] == pytest.approx((margins[decided] > 0).mean())
    assert figures["accuracy"] == pytest.approx(run.callback_metrics["val/rewards/accuracies"].item())
    assert not monitor.first  # no run has started
    assert 0 < (np.abs(margins) > 5).mean() < 1
    assert run.callback_metrics["val/rewards/margins_sd"].item() == pytest.approx(margins.std(), rel=1e-4)
    assert run.callback_metrics["val/rewards/saturated"].item() == pytest.approx((np.abs(margins) > 5).mean())
    assert not (tmp_path / "figures").exists()  # those of a run are left alone


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("spl.callbacks.rewards.log_figure", lambda trainer, name, figure: drawn.append(figure))
    run = trainer(tmp_path, StartEndValidation(), RewardMonitor(), num_sanity_val_steps=2)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"))
    assert len(drawn) == 2
    left, right = drawn[-1].axes
    assert [t.get_text() for t in left.get_legend().get_texts()] == [
        "chosen", "rejected", "chosen, step 0", "rejected, step 0"
    ]  # fmt: skip
    assert "step 3" in left.get_title()
    accuracy = run.callback_metrics["val/rewards/accuracies"].item()
    assert f"{accuracy:.1%} right" in right.get_title()
    assert all("right of 21" in figure.axes[1].get_title() for figure in drawn)  # not those of the sanity check besides
    # Bars right of zero and left of it: together all comparisons, but for the outermost at the two ends.
    right_of, left_of = (patch.get_data() for patch in right.patches[:2])
    assert right_of.edges[0] == left_of.edges[-1] == 0
    assert 96 < right_of.values.sum() + left_of.values.sum() <= 100 + 1e-9
    first, _ = drawn[0].axes
    assert [t.get_text() for t in first.get_legend().get_texts()] == ["chosen", "rejected"]


def test_a_policy_that_still_is_its_reference(tmp_path: Path) -> None:
    """All margins are zero: a spike, and no figure that is not a number."""
    torch.manual_seed(0)
    module = PreferenceModule("tiny", alpha=0.1, beta=0.1, lora_rank=4)
    run = trainer(tmp_path, RewardMonitor())
    run.validate(module, PreferenceDataModule("survey", val_path="survey"), verbose=False)
    assert run.callback_metrics["val/rewards/margins_sd"] == pytest.approx(0, abs=1e-5)
    assert run.callback_metrics["val/rewards/saturated"] == 0


def test_the_start_survives_a_resume(tmp_path: Path) -> None:
    monitor = RewardMonitor()
    run = trainer(tmp_path, StartEndValidation(), monitor)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = RewardMonitor()
    run = trainer(tmp_path, StartEndValidation(), again, steps=5)
    run.fit(preference(), PreferenceDataModule("survey", val_path="survey"), ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(again.first) == 3
    assert (again.first_step, again.first) == (0, monitor.first)


def test_under_test(tmp_path: Path) -> None:
    run = trainer(tmp_path, RewardMonitor())
    run.test(preference(), PreferenceDataModule("survey", val_path="survey"), verbose=False)
    assert {"test/rewards/margins_sd", "test/rewards/saturated"} <= run.callback_metrics.keys()
    assert not (tmp_path / "figures").exists()


def test_a_module_without_rewards_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    run = trainer(tmp_path, RewardMonitor())
    run.validate(
        SFTModule("tiny", lora_rank=4), PreferenceDataModule("survey", val_path="survey", batch_size=2), verbose=False
    )
    assert "val/rewards/saturated" not in run.callback_metrics
    assert [r.message for r in caplog.records if "RewardMonitor" in r.message] == [
        "RewardMonitor needs rewards of replies: this run has none to show."
    ]
