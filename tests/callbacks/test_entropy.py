"""The sampler and the entropy monitor, in runs of the tiny model."""

import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import monitor_run
import pytest
import torch
from lightning import Callback, Trainer
from monitor_run import module, run, trainer
from torch.utils.data import DataLoader

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.checkpoints import Checkpoints
from spl.callbacks.early_warnings import EarlyWarnings
from spl.callbacks.entropy import EntropyMonitor
from spl.callbacks.interrupt import InterruptedTrainingError
from spl.callbacks.reference_cache import ReferenceCache
from spl.callbacks.rewards import RewardMonitor
from spl.callbacks.sampler import PolicySampler, SampleRound
from spl.callbacks.throughput import ThroughputMonitor
from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule
from spl.sampling.generate import sample
from spl.types import UserError


class Rounds(Callback):
    """Keeps what the sampler gives."""

    def __init__(self) -> None:
        self.rounds: list[SampleRound] = []

    def on_samples(self, trainer: Trainer, pl_module: Any, samples: SampleRound) -> None:
        self.rounds.append(samples)


SAMPLER: dict[str, Any] = {"num_prompts": 3, "num_samples": 4, "max_new_tokens": 10, "every_n_steps": 2}


def survey(**options: Any) -> PreferenceDataModule:
    return PreferenceDataModule("survey", val_path="survey", turn_end="eos", batch_size=8, **options)


def rows(folder: Path, column: str) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file) if row[column]
        ]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder)


def test_rounds_before_during_and_after(tmp_path: Path) -> None:
    seen = Rounds()
    trainer(tmp_path, seen, PolicySampler(**SAMPLER), steps=5).fit(module(), survey())
    assert [r.step for r in seen.rounds] == [0, 2, 4, 5]
    for r in seen.rounds:
        assert [len(s.texts) for s in r.policy] == [4, 4, 4]
        assert r.laws.num_tokens.tolist() == [len(ids) for s in r.policy for ids in s.token_ids]


def test_a_step_of_several_batches_is_sampled_once(tmp_path: Path) -> None:
    seen = Rounds()
    fitted = trainer(tmp_path, seen, PolicySampler(**SAMPLER), steps=3, accumulate_grad_batches=4)
    fitted.fit(module(), PreferenceDataModule("survey", val_path="survey", batch_size=1))
    assert [r.step for r in seen.rounds] == [0, 2, 3]


def test_the_first_round_is_the_reference_and_later_ones_are_not(tmp_path: Path) -> None:
    seen = Rounds()
    policy = module(lr=0.05)
    trainer(tmp_path, seen, PolicySampler(**SAMPLER)).fit(policy, survey())
    first, last = seen.rounds[0], seen.rounds[-1]
    assert first.policy == first.reference == last.reference
    assert last.policy != last.reference
    assert torch.equal(first.laws.cross_entropies, first.laws.entropies)
    assert (last.laws.cross_entropies > last.laws.entropies).all()
    # The reference's replies, drawn again from the same random numbers by the model as it is loaded.
    data = survey()
    data.trainer = policy.trainer
    data.setup("fit")
    prompts = data.prompts(3)
    again = sample(
        PreferenceModule("tiny", lora_rank=0).load_policy().eval(),
        [p.input_ids for p in prompts],
        4,
        eos_token_ids=policy.eos_token_ids,
        max_new_tokens=10,
        seeds=[0, 1, 2],
    )
    assert [list(s.token_ids) for s in last.reference] == again


def test_sampling_moves_no_number_of_training(tmp_path: Path) -> None:
    """Weights after training with monitors are those without, to the last bit."""
    weights = []
    for name, callbacks in (("with", monitor_run.monitors()), ("without", [Rounds()])):
        policy = module()
        data = survey()
        fitted = trainer(tmp_path / name, *callbacks, limit_val_batches=0)
        fitted.fit(policy, data)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad]))
    assert torch.equal(*weights)


def test_nothing_is_drawn_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spl.callbacks.sampler.sample", lambda *_, **__: pytest.fail("drawn"))
    trainer(tmp_path, PolicySampler(**SAMPLER), ThroughputMonitor(), EarlyWarnings()).fit(module(), survey())


def test_a_monitor_brings_a_sampler(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, EntropyMonitor(), steps=1)
    fitted.fit(module(), survey())
    assert sum(isinstance(c, PolicySampler) for c in fitted.callbacks) == 1
    assert "val/entropy" in fitted.callback_metrics


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    seen = Rounds()
    sampler = PolicySampler(**{**SAMPLER, "prompts": ["Name a fruit.", "Hello?"]})
    trainer(tmp_path, seen, sampler, steps=1).fit(module(), survey())
    assert ["Name a fruit." in s.prompt for s in seen.rounds[0].policy] == [True, False]


def test_without_a_data_module_it_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, data = module(), survey()
    trainer(tmp_path / "a", Rounds(), steps=1).fit(policy, data)
    batches = DataLoader([data.first_batch()], collate_fn=itemgetter(0))
    with caplog.at_level(logging.WARNING, "spl"):
        trainer(tmp_path / "b", EntropyMonitor(), PolicySampler(**SAMPLER), steps=2).fit(policy, batches, batches)
    said = [r.getMessage() for r in caplog.records if "samples" in r.getMessage()]
    assert len(said) == 1 and "PreferenceDataModule" in said[0]


@pytest.mark.parametrize("name", ["every_n_steps", "num_prompts", "num_samples", "max_new_tokens"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(UserError, match=f"samples.{name} must be 1 or more, but is 0"):
        PolicySampler(**{name: 0})


def test_logged_figures_by_hand(tmp_path: Path) -> None:
    """From the rounds themselves: means over prompts, ratios of means, paired differences."""
    seen = Rounds()
    trainer(tmp_path, seen, EntropyMonitor(), PolicySampler(**SAMPLER)).fit(module(lr=0.05), survey())
    logged = rows(tmp_path, "val/entropy")
    assert [row["step"] for row in logged] == [0, 1, 3]  # Lightning's figures of the same weights stand there too
    assert [row["step"] for row in rows(tmp_path, "train/loss")] == [0, 1, 2, 3]
    for row, r in zip(logged, seen.rounds, strict=True):
        laws, entropy = r.laws, r.laws.entropies.view(3, 4)
        length = laws.num_tokens.double().view(3, 4)
        ended = torch.tensor([s.ended for s in r.policy]).double()
        assert r.reference_laws is not None
        expected = {
            "entropy": entropy.mean(),
            "entropy_se": (entropy.var(1) / 4).sum().sqrt() / 3,
            "entropy_per_token": entropy.sum() / length.sum(),
            "surprisal": -laws.logps.mean(),
            "cross_entropy": laws.cross_entropies.mean(),
            "kl": (laws.cross_entropies - laws.entropies).mean(),
            "length": length.mean(),
            "eos_rate": ended.mean(),
            "truncation_rate": 1 - ended.mean(),
            "entropy_change": (entropy - r.reference_laws.entropies.view(3, 4)).mean(),
        }
        for name, value in expected.items():
            assert row[f"val/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
        assert row["val/kl"] == pytest.approx(row["val/cross_entropy"] - row["val/entropy"], abs=1e-3)
    once = {name for name in logged[0] if "reference_" in name or "forecast" in name}
    assert once >= {"val/reference_entropy", "val/reference_length", "val/forecast_log_z", "val/forecast_log_z_se"}
    assert not once & set(logged[1])
    # log Z of uniform laws over V tokens at temperature tau would be (1 - 1/tau) log V a token; these are nearly so.
    assert logged[0]["val/forecast_log_z_per_token"] == pytest.approx((1 - 0.1 / 0.5) * math.log(263), rel=0.02)
    assert (tmp_path / "figures" / "entropy.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [{"alpha": 1.0, "beta": 0.0}, {"lora_rank": 0}], ids=["no beta", "all weights"])
def test_other_references(tmp_path: Path, options: dict[str, Any]) -> None:
    """With beta 0 the policy before step 1 is still at hand under LoRA; with all weights training it is a copy."""
    fitted = trainer(tmp_path, EntropyMonitor(), PolicySampler(**SAMPLER))
    fitted.fit(module(**options), survey())
    logged = rows(tmp_path, "val/entropy")
    assert logged[0]["val/kl"] == 0 < logged[-1]["val/kl"]
    assert ("val/forecast_log_z" in logged[0]) == ("beta" not in options)


def test_without_any_reference(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, EntropyMonitor(), PolicySampler(**SAMPLER))
    fitted.fit(module(alpha=1.0, beta=0.0, lora_rank=0), survey())
    names = set(rows(tmp_path, "val/entropy")[-1])
    assert {"val/entropy", "val/length", "val/eos_rate", "val/surprisal"} <= names
    assert not {name for name in names if "kl" in name or "cross" in name or "change" in name or "reference" in name}
    assert (tmp_path / "figures" / "entropy.png").is_file()


def test_the_reference_is_drawn_again_after_a_resume(tmp_path: Path) -> None:
    whole, parts = Rounds(), Rounds()
    trainer(tmp_path / "whole", whole, EntropyMonitor(), PolicySampler(**SAMPLER)).fit(module(), survey())
    first = trainer(tmp_path / "parts", parts, EntropyMonitor(), PolicySampler(**SAMPLER), steps=2)
    first.fit(module(), survey())
    first.save_checkpoint(tmp_path / "half.ckpt")
    monitor = EntropyMonitor()
    again = trainer(tmp_path / "parts", parts, monitor, PolicySampler(**SAMPLER), steps=4)
    again.fit(module(), survey(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert [r.step for r in parts.rounds] == [0, 2, 4]
    assert parts.rounds[-1].reference == whole.rounds[-1].reference
    assert [row["step"] for row in monitor.history] == [0, 2, 4]
    assert monitor.reference["entropy"] == pytest.approx(float(whole.rounds[0].laws.entropies.mean()), rel=1e-5)


def test_validate_samples_too_and_a_fit_can_follow(tmp_path: Path) -> None:
    """Also under Lightning's default inference mode, in which states that are reset take no update in place."""
    seen = Rounds()
    fitted = trainer(tmp_path, *monitor_run.monitors(), seen, inference_mode=True)
    fitted.validate(module(), survey(), verbose=False)
    assert [r.step for r in seen.rounds] == [0]
    assert math.isfinite(fitted.callback_metrics["val/entropy"])
    assert not (tmp_path / "figures").exists() and not (tmp_path / "samples.jsonl").exists()
    fitted.fit(module(), survey())
    assert [r.step for r in seen.rounds] == [0, 0, 2, 4]


def test_a_second_run_with_the_same_callbacks_begins_anew(tmp_path: Path) -> None:
    callbacks = monitor_run.monitors()
    monitor = next(c for c in callbacks if isinstance(c, EntropyMonitor))
    for lr in (5e-3, 1e-2):
        trainer(tmp_path / str(lr), *callbacks).fit(module(lr=lr), survey())
        assert [row["step"] for row in monitor.history] == [0, 2, 4]


def test_a_second_fit_of_one_module_knows_that_it_is_trained(tmp_path: Path) -> None:
    policy, seen = module(lr=0.05), Rounds()
    trainer(tmp_path / "a", steps=2, limit_val_batches=0).fit(policy, survey())
    trainer(tmp_path / "b", seen, PolicySampler(**SAMPLER), steps=2).fit(policy, survey())
    assert (seen.rounds[0].laws.cross_entropies > seen.rounds[0].laws.entropies).all()
    assert seen.rounds[0].policy != seen.rounds[0].reference


class Interrupt(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_round_that_an_interrupt_came_before_is_drawn_on_resuming(tmp_path: Path) -> None:
    whole, parts = Rounds(), Rounds()
    trainer(tmp_path / "whole", whole, PolicySampler(**SAMPLER)).fit(module(), survey())
    with pytest.raises(InterruptedTrainingError):
        trainer(tmp_path, Interrupt(), Checkpoints(), parts, PolicySampler(**SAMPLER)).fit(module(), survey())
    assert [r.step for r in parts.rounds] == [0]
    last = tmp_path / "checkpoints" / "last.ckpt"
    again = trainer(tmp_path, parts, PolicySampler(**SAMPLER))
    again.fit(module(), survey(), ckpt_path=last, weights_only=True)
    assert [r.step for r in parts.rounds] == [0, 2, 4]
    for mine, theirs in zip(parts.rounds, whole.rounds, strict=True):
        assert mine.policy == theirs.policy


def test_a_resumed_run_does_not_draw_again_within_a_step(tmp_path: Path) -> None:
    seen = Rounds()
    first = trainer(tmp_path / "a", seen, PolicySampler(**SAMPLER), steps=2, accumulate_grad_batches=2)
    first.fit(module(), PreferenceDataModule("survey", val_path="survey", batch_size=4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(tmp_path / "b", seen, PolicySampler(**SAMPLER), steps=4, accumulate_grad_batches=2)
    again.fit(
        module(),
        PreferenceDataModule("survey", val_path="survey", batch_size=4),
        ckpt_path=tmp_path / "half.ckpt",
        weights_only=True,
    )
    assert [r.step for r in seen.rounds] == [0, 2, 4]


def test_a_warm_reference_cache_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all weights training and every number kept, monitors load the reference once, and put it aside."""
    loads = []
    load = PreferenceModule.load_policy
    monkeypatch.setattr(PreferenceModule, "load_policy", lambda self: (loads.append(1), load(self))[1])
    for name in ("cold", "warm"):
        loads.clear()
        policy, seen = module(lora_rank=0), Rounds()
        callbacks = [ReferenceCache(str(tmp_path / "cache")), seen, PolicySampler(**SAMPLER)]
        trainer(tmp_path / name, *callbacks, steps=6).fit(policy, survey())
    assert len(loads) == 2  # the policy, and the reference at the round of step 2
    assert policy.reference is not None and policy.reference.model is None
    assert seen.rounds[0].laws.cross_entropies.equal(seen.rounds[0].laws.entropies)
    assert (seen.rounds[-1].laws.cross_entropies > seen.rounds[-1].laws.entropies).all()


def test_logits_that_are_not_numbers(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                next(p for p in pl_module.policy.parameters() if p.requires_grad).data.fill_(math.nan)

    with pytest.raises(UserError, match="logits are not finite at step 2"):
        trainer(tmp_path, Spoil(), Rounds(), PolicySampler(**SAMPLER)).fit(module(), survey())


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("monitor", [CalibrationMonitor, RewardMonitor])
def test_no_held_out_data_is_told_once(tmp_path: Path, monitor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "spl"):
        trainer(tmp_path, monitor(), steps=2).fit(module(), PreferenceDataModule("survey", batch_size=8))
    (said,) = [r.getMessage() for r in caplog.records if r.name == "spl.callbacks.held_out"]
    assert monitor.__name__ in said and "data.val_size" in said


def test_everything_is_in_the_run_folder(one: tuple[Path, Trainer]) -> None:
    folder, fitted = one
    assert {f.name for f in (folder / "figures").iterdir()} == {
        "entropy.png",
        "calibration.png",
        "diversity.png",
        "rewards.png",
    }
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 3 * 5
    for name in ("cross_entropy", "ece", "generative_ece_equal_mass", "log_loss", "distinct_2", "rewards/margins"):
        assert f"val/{name}" in fitted.callback_metrics


def test_two_processes_give_the_numbers_of_one(one: tuple[Path, Trainer], tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, monitor_run.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures, other = (json.loads((tmp_path / f"figures-{rank}.json").read_text()) for rank in (0, 1))
    expected = {name: value.item() for name, value in one[1].callback_metrics.items() if name.startswith("val/")}
    assert len(expected) > 60
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=2e-3, abs=2e-3, nan_ok=True), name
        assert other[name] == figures[name] or math.isnan(figures[name]), name
    texts = [
        [json.loads(line)["reference"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (one[0], tmp_path)
    ]
    assert texts[0] == texts[1]
