"""The module in a Trainer: what it trains, what it holds fixed, and that no way of batching changes the result."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from spl.callbacks.checkpoints import Checkpoints
from spl.callbacks.interrupt import InterruptedTrainingError, stoppable
from spl.data.base import PreferenceDataModule
from spl.data.collate import EncodedExample, collate
from spl.data.survey import SURVEY
from spl.models import load_model
from spl.modules.figures import preference_figures
from spl.modules.non_finite import NonFiniteLossError
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.types import Comparison, PreferenceBatch, StepOutput, UserError


class Losses(Callback):
    """The objective of every micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["objective"].item())


def trainer(folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def fit(folder: Path, steps: int, batch_size: int = 8, accumulate: int = 1, **options: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    module = PreferenceModule("tiny", lr=5e-3, **{"alpha": 1.0, "lora_rank": 4, **options})
    losses = Losses()
    data = PreferenceDataModule("survey", batch_size=batch_size)
    trainer(folder, steps, losses, accumulate_grad_batches=accumulate).fit(module, data)
    return module, losses.losses


def trained(module: PreferenceModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def pair(p: float = 1.0, alpha: float | None = None) -> PreferenceBatch:
    sequences = ((256, 260, 65, 66, 257), (256, 260, 65, 67, 68, 257))
    return collate([EncodedExample(sequences, (3, 3), (Comparison(0, 1, p),), alpha, "pairs.jsonl, row 7")])


def configured(**options: Any) -> PreferenceModule:
    module = PreferenceModule("tiny", **{"lora_rank": 4, **options})
    module.configure_model()
    return module


def response_logps(model: Any, sequence: list[int], start: int) -> float:
    """By transformers alone."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    return sum(log_probs[k - 1, sequence[k]].item() for k in range(start, len(sequence)))


def test_first_loss_by_hand() -> None:
    base = load_model("tiny")
    ratio = response_logps(base, [256, 260, 65, 66, 257], 3) - response_logps(base, [256, 260, 65, 67, 68, 257], 3)
    for alpha, beta, p in ((0.1, 0.1, 1.0), (1.0, 0.1, 1.0), (0.3, 0.0, 0.7)):
        margin = (alpha - beta) * ratio
        expected = p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin))
        check = configured(alpha=alpha, beta=beta).start_check(pair(p))
        assert check.expected_loss == pytest.approx(expected, abs=1e-5)
        assert check.gap is None if beta == 0 else check.gap == 0


def test_accumulation_traces_the_whole_batch(tmp_path: Path) -> None:
    whole, losses = fit(tmp_path, 6, batch_size=8)
    parts, micro = fit(tmp_path, 6, batch_size=2, accumulate=4)
    means = [sum(micro[k : k + 4]) / 4 for k in range(0, 24, 4)]
    assert losses == pytest.approx(means, abs=1e-5)
    assert losses[-1] < losses[0]
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora_rank", [4, 0], ids=["lora", "full"])
def test_the_reference_is_the_starting_policy_before_and_after(tmp_path: Path, lora_rank: int) -> None:
    batch = pair()
    start = [response_logps(load_model("tiny"), [256, 260, 65, 66, 257], 3)]
    module, _ = fit(tmp_path, 4, lora_rank=lora_rank)
    assert module.reference_logps(batch)[0].item() == pytest.approx(start[0], abs=1e-4)
    assert abs(module.score(batch).logps[0].item() - start[0]) > 1e-2
    assert not any("reference" in name for name in module.state_dict())
    assert (module.reference.model is None) == (lora_rank > 0)
    trainable = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert trainable == {id(p) for p in module.policy.parameters() if p.requires_grad}


def test_beta_zero_holds_no_reference() -> None:
    module = configured(alpha=1.0, beta=0.0, lora_rank=0)
    assert module.reference is None
    assert module.reference_logps(pair()) is None
    assert module.training_step is not None
    assert torch.isfinite(module.loss_of(pair()))


def test_an_examples_own_alpha_goes_first() -> None:
    assert configured(alpha=1.0).loss_of(pair(alpha=0.2)).item() == pytest.approx(
        configured(alpha=0.2).loss_of(pair()).item(), abs=1e-6
    )


def test_a_non_finite_loss_names_its_rows_and_spares_the_weights(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                self.before = trained(pl_module)
                pl_module.policy.get_input_embeddings().weight.data.fill_(math.nan)

    poison = Poison()
    module = PreferenceModule("tiny", lora_rank=4)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 2 on survey, row \d"):
        trainer(tmp_path, 5, poison).fit(module, PreferenceDataModule("survey", batch_size=2))
    for name, weight in trained(module).items():
        assert torch.equal(weight, poison.before[name])


def test_checkpoints_hold_what_trains_and_refuse_another_model(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, 2)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == trained(module).keys()
    with pytest.raises(UserError, match="holds other weights"):
        trainer(tmp_path, 4).fit(
            PreferenceModule("tiny", lora_rank=0), PreferenceDataModule("survey"), ckpt_path=tmp_path / "a.ckpt"
        )


def test_weights_that_are_not_finite_leave_the_last_good_checkpoint(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, 2)
    path = tmp_path / "last.ckpt"
    module.trainer.save_checkpoint(path)
    good = path.read_bytes()
    next(iter(p for p in module.parameters() if p.requires_grad)).data[0] = math.inf
    with pytest.raises(NonFiniteLossError, match="not finite after step 2, and were not saved"):
        module.trainer.save_checkpoint(path)
    assert path.read_bytes() == good


class Stop(Callback):
    """Asks the run to stop, as a signal would, during a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("at", "streaming"), [(5, False), (7, False), (5, True), (7, True)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, at: int, streaming: bool) -> None:
    def data() -> PreferenceDataModule:
        return PreferenceDataModule("survey", batch_size=2, streaming=streaming)  # four batches an epoch

    def module() -> PreferenceModule:
        torch.manual_seed(0)
        return PreferenceModule("tiny", lora_rank=4, lr=5e-3)

    whole, straight = module(), Losses()
    trainer(tmp_path, 12, straight).fit(whole, data())
    before = Losses()
    with pytest.raises(InterruptedTrainingError, match=f"SIGTERM after step {at + 1}"):
        trainer(tmp_path, 12, before, Stop(at), Checkpoints()).fit(module(), data())
    after, rest = module(), Losses()
    trainer(tmp_path, 12, rest).fit(after, data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert before.losses + rest.losses == straight.losses
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(after)[name])


class OfTwo(SingleDeviceStrategy):
    """A process of two: the other is asked to stop in step 3, and this one as it saves the checkpoint of that step."""

    told = False

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.told or self.lightning_module.trainer.global_step < 3:
            return decision
        self.told = True
        return True

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().save_checkpoint(*args, **kwargs)


def test_a_signal_that_comes_as_another_process_has_its_checkpoint_saved_waits(tmp_path: Path) -> None:
    stopping = trainer(tmp_path, 12, Checkpoints(), strategy=OfTwo("cpu"))
    with stoppable(), pytest.raises(InterruptedTrainingError, match=r"after step 3; saved .*step=3\.ckpt"):
        stopping.fit(PreferenceModule("tiny", lora_rank=4), PreferenceDataModule("survey", batch_size=2))
    assert (tmp_path / "checkpoints" / "step=3.ckpt").is_file()


def test_sft_by_hand_and_towards_its_floor(tmp_path: Path) -> None:
    module = SFTModule("tiny", weighting="response", lora_rank=4, lr=1e-2)
    module.configure_model()
    base = load_model("tiny")
    expected = (
        -(response_logps(base, [256, 260, 65, 66, 257], 3) + response_logps(base, [256, 260, 65, 67, 68, 257], 3)) / 2
    )
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    assert module.training_step(pair(), 0)["loss"].item() == pytest.approx(expected, abs=1e-4)
    losses = Losses()
    trainer(tmp_path, 150, losses).fit(
        SFTModule("tiny", weighting="response", lora_rank=0, lr=3e-3), PreferenceDataModule("survey")
    )
    floor = sum(math.log(len(q.shares)) for q in SURVEY) / len(SURVEY)
    assert floor < losses.losses[-1] < floor + 1


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lora_rank": -1}, {"alpha": 0.0}, {"beta": -0.1}])
def test_settings_out_of_range(options: dict[str, float]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=rf"{name}.*{value}"):
        PreferenceModule("tiny", **options)


def test_a_scorer_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("spl.modules.policy.gap_to_plain", lambda *_: 0.5)
    module = configured()
    with caplog.at_level("WARNING", logger="spl"):
        module.score(pair())
    assert module.scorer == "plain"
    assert "differs by 0.5 nats a token on LlamaForCausalLM" in caplog.text


def test_on_a_gpu_a_kernel_that_disagrees_gives_way_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spl.modules.policy.gap_to_plain", lambda *args: 1e-6 if args[-1] == "sdpa" else math.inf)
    monkeypatch.setattr(PreferenceModule, "device", torch.device("cuda"))
    module = configured()
    module._choose_scorer(pair())
    assert (module.scorer, module.backend) == ("forest", "sdpa")


def test_a_kernel_that_was_asked_for_and_cannot_run_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.attention flex cannot run: it trains on CUDA devices alone"):
        configured(attention="flex").score(pair())
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"model\.attention varlen cannot run"):
        trainer.fit(PreferenceModule("tiny", attention="varlen"), PreferenceDataModule("survey"))
    with pytest.raises(UserError, match=r"model\.attention flex is a kernel of the forest, but model.scorer is plain"):
        PreferenceModule("tiny", attention="flex", scorer="plain")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_its_schedule(tmp_path: Path, schedule: str) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = PreferenceModule("tiny", lora_rank=4, lr=1e-3, warmup=4, schedule=schedule)
    trainer(tmp_path, 12, Rates()).fit(module, PreferenceDataModule("survey"))
    after = {
        "constant": lambda s: 1.0,
        "linear": lambda s: 1 - s,
        "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    }[schedule]
    expected = [1e-3 * (k / 4 if k < 4 else after((k - 4) / 8)) for k in range(12)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_weight_decay_spares_vectors() -> None:
    module = configured(lora_rank=0, weight_decay=0.1)
    module.trainer = type("T", (), {"estimated_stepping_batches": 10})()  # type: ignore[assignment]
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_figures_by_hand() -> None:
    comparisons = (Comparison(0, 1, 0.9), Comparison(1, 2, 0.2), Comparison(0, 2, 0.5))
    sequences = ((256, 65, 257), (256, 66, 67, 257), (256, 68, 257))
    batch = collate([EncodedExample(sequences, (1, 1, 1), comparisons, None, "row")])
    output = StepOutput(
        loss=torch.tensor(0.5),
        objective=torch.tensor(0.5),
        policy_logps=torch.tensor([-2.0, -6.0, -4.0]),
        reference_logps=torch.zeros(3),
        entropies=torch.tensor([1.0, 2.0, 4.0]),
        num_response_tokens=torch.tensor([2, 3, 2]),
        rewards=torch.tensor([3.0, 1.0, -1.0]),
        margins=torch.tensor([2.0, 2.0, 4.0]),
        shares=batch.shares,
        num_tokens=batch.num_tokens,
    )
    # Preferred: 0 of (0, 1), 2 of (1, 2), 0 of the tie, which has no right answer.
    expected = {
        "loss": (0.5, 1),
        "rewards/margins": ((2 - 2 + 4) / 3, 3),
        "rewards/accuracies": (1 / 2, 2),
        "rewards/chosen": ((3 - 1 + 3) / 3, 3),
        "rewards/rejected": ((1 + 1 - 1) / 3, 3),
        "logps/chosen": ((-2 - 4 - 2) / 3, 3),
        "logps/rejected": ((-6 - 6 - 4) / 3, 3),
        "logps/chosen_per_token": ((-1 - 2 - 1) / 3, 3),
        "token_entropy": (7 / 7, 7),
    }
    found = preference_figures(output, batch)
    assert found.keys() == expected.keys()
    for name, (value, count) in expected.items():
        assert (found[name][0].item(), found[name][1]) == (pytest.approx(value), count), name


def test_validation_figures_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    found = []
    for batch_size in (8, 3):
        module = PreferenceModule("tiny", lora_rank=4, alpha=1.0)
        data = PreferenceDataModule("survey", val_path="survey", batch_size=batch_size)
        options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        found.append(Trainer(accelerator="cpu", **options).validate(module, data, verbose=False)[0])
    assert found[0]["val/rewards/num"] == 21
    assert found[0] == pytest.approx(found[1], abs=1e-4)
