"""Each warning comes where its rule says, once, whatever the order of the callbacks, and not from stale figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from tiny_fit import fit

from spl.callbacks.early_warnings import RULES, EarlyWarnings, find
from spl.callbacks.record import log_now
from spl.types import UserError

LIMITS = EarlyWarnings().limits
SOUND = {
    "val/entropy_per_token": 1.0,
    "val/reference_entropy_per_token": 2.0,
    "val/length": 30.0,
    "val/reference_length": 20.0,
    "val/eos_rate": 0.5,
    "val/reference_eos_rate": 0.7,
    "val/rewards/saturated": 0.9,
    "val/kl": 1e-5,
}
"""Every figure at its limit."""
BEYOND = [
    ("entropy_share", "val/entropy_per_token", 0.99, "model.alpha"),
    ("length_factor", "val/length", 30.1, "matched length"),
    ("eos_drop", "val/eos_rate", 0.28, "data.turn_end"),
    ("saturated", "val/rewards/saturated", 0.91, "model.label_smoothing"),
    ("least_kl", "val/kl", 9e-6, "model.lr"),
    ("cut_share", "val/reference_eos_rate", 0.49, "samples.max_new_tokens"),
]


def test_nothing_is_said_at_the_limits() -> None:
    assert find(SOUND, LIMITS) == find({}, LIMITS) == {}


@pytest.mark.parametrize(("name", "figure", "value", "remedy"), BEYOND)
def test_a_rule_speaks_beyond_its_limit(name: str, figure: str, value: float, remedy: str) -> None:
    found = find(SOUND | {figure: value}, LIMITS)
    assert found.keys() == {name}
    assert remedy in found[name] and found[name].endswith(".") and "\n" not in found[name]


@pytest.mark.parametrize("missing", SOUND)
def test_a_rule_without_its_figure_is_passed_over(missing: str) -> None:
    worst = SOUND | {figure: value for _, figure, value, _ in BEYOND}
    silent = find(worst, LIMITS).keys() - find({k: v for k, v in worst.items() if k != missing}, LIMITS).keys()
    assert silent == {name for name, rule in RULES.items() if missing in rule.reads} != set()
    assert find(worst, LIMITS).keys() - find(worst | {missing: math.nan}, LIMITS).keys() == silent


def test_limits_are_not_negative() -> None:
    with pytest.raises(UserError, match=r"EarlyWarnings: eos_drop must be 0 or more, but is -1"):
        EarlyWarnings(eos_drop=-1)


class Feed(Callback):
    """Rounds of samples after given steps (0: before the first), with the figures that monitors would log."""

    def __init__(self, rounds: dict[int, dict[str, float]]) -> None:
        self.rounds = rounds

    def _round(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step in self.rounds:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "on_sampling_start"):
                    callback.on_sampling_start(trainer, pl_module)
            log_now(trainer, self.rounds[trainer.global_step])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._round(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            self._round(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._round(trainer, pl_module)


def said(
    folder: Path,
    rounds: dict[int, dict[str, float]],
    caplog: pytest.LogCaptureFixture,
    warnings: EarlyWarnings | None = None,
    first: bool = True,
    others: Sequence[Callback] = (),
    **options: Any,
) -> list[str]:
    """What a run warns of."""
    caplog.clear()
    callbacks = [warnings or EarlyWarnings(), Feed(rounds)]
    fit(
        folder,
        *others,
        *(callbacks if first else callbacks[::-1]),
        **{"check_val_every_n_epoch": 1, "steps": 4, **options},
    )
    return [r.message for r in caplog.records if r.name == "spl.callbacks.early_warnings"]


LOW = {"val/entropy_per_token": 0.5, "val/reference_entropy_per_token": 2.0}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_warning_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, first: bool) -> None:
    low = dict.fromkeys(range(step, 5), LOW)
    (warning,) = said(tmp_path, low, caplog, first=first, limit_val_batches=0)
    assert "0.5 nats a token" in warning


def test_a_resumed_run_remembers_what_was_said_and_the_reference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after, other = EarlyWarnings(), EarlyWarnings(), EarlyWarnings()
    assert len(said(tmp_path, {1: LOW | {"val/reference_length": 10.0}}, caplog, before)) == 1
    torch.save(before.state_dict(), tmp_path / "state.pt")

    class Load(Callback):
        """A checkpoint's states are loaded once all callbacks are set up."""

        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    # The reference's figures are logged once, by the run's first round.
    later = {1: {"val/entropy_per_token": 0.5, "val/length": 16.0}}
    (warning,) = said(tmp_path, later, caplog, after, others=[Load()])
    assert "16 tokens" in warning
    assert said(tmp_path, later, caplog, other) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_policy_that_does_not_move(tmp_path: Path, caplog: pytest.LogCaptureFixture, first: bool) -> None:
    """Warm-up of the tiny run: 0.05 of 4 steps, which is none."""
    still = {"val/kl": 0.0}
    assert said(tmp_path, {0: still, 4: {"val/kl": 0.1}}, caplog, first=first) == []
    assert said(tmp_path, {0: still}, caplog, first=first) == []  # validations after it do not look at it again
    # By the last round the schedule has brought the learning rate to 0.
    for step in (2, 4):
        (warning,) = said(tmp_path, {0: still, step: still}, caplog, first=first)
        assert "nothing is learnt" in warning


def test_a_policy_does_not_move_in_its_warm_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    still = {"val/kl": 0.0}
    assert said(tmp_path, {1: still, 2: still}, caplog, warmup=2) == []
    assert len(said(tmp_path, {1: still, 3: still}, caplog, warmup=2)) == 1


def test_a_second_run_of_the_same_callback_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warnings = EarlyWarnings()
    assert len(said(tmp_path, {1: LOW}, caplog, warnings)) == 1
    assert said(tmp_path, {1: {"val/entropy_per_token": 0.5}}, caplog, warnings) == []  # of another reference
    assert len(said(tmp_path, {1: LOW}, caplog, warnings)) == 1


def test_saturated_margins_are_seen_after_a_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Saturated(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.log("val/rewards/saturated", 0.95)

    caplog.clear()
    fit(tmp_path, EarlyWarnings(), Saturated(), check_val_every_n_epoch=1)
    (warning,) = [r.message for r in caplog.records if r.name == "spl.callbacks.early_warnings"]
    assert "95%" in warning
