"""The cache in whole runs: what they find, what they need not compute, and that no number changes for it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaModel

from spl.callbacks.checkpoints import Checkpoints
from spl.callbacks.interrupt import InterruptedTrainingError
from spl.callbacks.reference_cache import ReferenceCache
from spl.cli import main
from spl.data.base import PreferenceDataModule
from spl.logprobs.cache import LogpCache
from spl.logprobs.sequence import sequence_logps
from spl.models import fingerprint, load_model
from spl.modules.preference import PreferenceModule
from spl.types import PreferenceBatch, UserError

TINY = ["fit", "--config", str(Path(__file__).parents[2] / "configs/experiment/tiny.yaml")]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "4", "--export.format", "none"]
RANKS = pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])


class Steps(Callback):
    """What every step saw, and how often a decoder ran in it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.references: list[torch.Tensor] = []
        self.batches: list[PreferenceBatch] = []
        self.passes: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.passes.append(-Passes.count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.passes[-1] += Passes.count
        self.losses.append(outputs["objective"].item())
        self.references.append(outputs["reference_logps"])
        self.batches.append(batch)


class Passes:
    """Counts runs of any Llama decoder: of the policy, of a copy, of one loaded on the way."""

    count = 0


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaModel.forward

    def counting(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        Passes.count += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counting)


def module_of(rank: int, **options: Any) -> PreferenceModule:
    torch.manual_seed(0)
    return PreferenceModule("tiny", **{"alpha": 1.0, "lr": 5e-3, "lora_rank": rank, "scorer": "forest", **options})


def trainer(folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"limit_val_batches": 0, **options},
    )  # fmt: skip


def run(
    cache: Path | str,
    rank: int = 4,
    steps: int = 12,
    path: str = "survey",
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[PreferenceModule, Steps]:
    """Of the survey, four batches make an epoch."""
    module, seen = module_of(rank, **options), Steps()
    data = PreferenceDataModule(path, batch_size=2)
    trainer(Path(), steps, seen, ReferenceCache(str(cache))).fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, seen


def trained(module: PreferenceModule) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def same(one: PreferenceModule, two: PreferenceModule) -> bool:
    ours, theirs = trained(one), trained(two)
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


class Stop(Callback):
    """Asks the run to stop, as a signal would, during a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder: Path, cache: str, rank: int, after: int) -> tuple[Path, Steps]:
    """The checkpoint of a run of 8 steps that was stopped, and what it had seen."""
    seen, stops = Steps(), (Stop(after - 1), Checkpoints())
    with pytest.raises(InterruptedTrainingError, match=f"after step {after}"):
        trainer(folder, 8, seen, ReferenceCache(cache), *stops).fit(
            module_of(rank), PreferenceDataModule("survey", batch_size=2)
        )
    return folder / "checkpoints" / "last.ckpt", seen


@RANKS
def test_no_number_of_a_run_changes(tmp_path: Path, rank: int) -> None:
    none, without = run("none", rank)
    cold, first = run(tmp_path, rank)
    warm, second = run(tmp_path, rank)
    assert first.losses == pytest.approx(without.losses, abs=1e-6)
    assert first.losses[-1] < first.losses[0] - 1
    for name, weight in trained(none).items():
        torch.testing.assert_close(trained(cold)[name], weight, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(first.references, second.references, strict=True))
    assert second.losses == first.losses
    assert same(cold, warm)
    start = load_model("tiny")
    for batch, numbers in zip(second.batches, second.references, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(numbers, sequence_logps(start, batch).logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rank", "then"), [(4, 4), (0, 0), (4, 0), (0, 4)])
def test_other_settings_find_the_same_numbers(tmp_path: Path, rank: int, then: int) -> None:
    cold_module, cold = run(tmp_path, rank, 8)
    assert cold.passes[:4] == [2, 2, 2, 2]
    assert cold.passes[5:] == [1, 1, 1]
    assert cold_module.reference.model is None  # let go after the second epoch, which did not need it
    (file,) = kept(tmp_path)
    before = file.read_bytes()
    options = {"alpha": 0.3, "beta": 0.7, "lr": 1e-3, "lora_alpha": 8, "label_smoothing": 0.1}
    module, warm = run(tmp_path, then, 8, **options)
    assert warm.passes[0] <= 2  # two examples are checked
    assert warm.passes[1:] == [1] * 7
    assert module.reference.model is None
    assert kept(tmp_path) == [file]
    assert file.read_bytes() == before
    _, without = run("none", then, 8, **options)
    assert without.passes == [2] * 8
    assert warm.losses == pytest.approx(without.losses, abs=1e-6)


def test_a_row_that_is_not_kept_loads_the_start(tmp_path: Path) -> None:
    known = run(tmp_path, 0, 4)[1].batches[0]
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": f"Say {k}.", "chosen": f"{k}!", "rejected": "No."} for k in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    _, others = run("none", 0, 2, str(path))
    module, _ = run(tmp_path, 0, 4)
    reference = module.reference
    assert reference.model is None
    batch = others.batches[0]
    assert reference.needs_copy(batch)
    bare = module_of(0, beta=0.0)
    bare.configure_model()
    copy = sum(p.numel() * p.element_size() for p in bare.policy.parameters())
    assert module.peak_memory(batch) == bare.peak_memory(batch)._replace(reference=copy)
    assert module.peak_memory(known) == bare.peak_memory(known)
    # The policy has moved by four steps.
    assert (module.score(batch).logps - others.references[0]).abs().max() > 0.1
    assert torch.equal(module.reference_logps(batch), others.references[0])
    assert fingerprint(reference.model) == fingerprint(load_model("tiny"))
    assert not any("reference" in name for name, _ in module.named_parameters())
    mixed, seen = run(tmp_path, 0, 2, str(path))
    assert torch.equal(seen.references[0], others.references[0])
    assert mixed.reference.model is not None


def spoilt(folder: Path, good: Path, spoil: bytes) -> Path:
    """A folder of the numbers kept in another, one of them spoilt."""
    (file,) = kept(good)
    tensors = load_file(file)
    cache = LogpCache(folder, *file.parent.name.split("-", 1))
    cache.add([spoil], [-1.25])
    cache.add([bytes(key.tolist()) for key in tensors["keys"]], tensors["logps"].tolist())
    cache.write()
    return folder


@RANKS
def test_a_spoilt_number_ends_the_run(tmp_path: Path, rank: int) -> None:
    _, seen = run(tmp_path / "good", rank, 4)
    batch = seen.batches[0]
    bad = spoilt(tmp_path / "bad", tmp_path / "good", batch.response_keys[-1])
    with pytest.raises(UserError, match=r"the reference cache .* says -1\.250 nats of a response of") as raised:
        run(bad, rank, 4)
    assert f"{bad}{os.sep}" in str(raised.value)
    assert f"of {batch.rows[-1]}, and" in str(raised.value)


@RANKS
def test_a_resumed_run_checks_by_the_start_alone(tmp_path: Path, rank: int) -> None:
    _, seen = run(tmp_path / "good", rank, 8)
    bad = spoilt(tmp_path / "bad", tmp_path / "good", seen.batches[2].response_keys[0])
    checkpoint, _ = interrupted(tmp_path, "none", rank, 2)
    if rank:
        with pytest.raises(UserError, match=rf"of {seen.batches[2].rows[0]}, and"):
            run(bad, rank, 8, ckpt_path=checkpoint)
    # The trained policy is another than the start, and is not held against it.
    module, rest = run(tmp_path / "good", rank, 8, ckpt_path=checkpoint)
    assert module.reference.model is None
    assert all(torch.equal(a, b) for a, b in zip(rest.references, seen.references[2:], strict=True))


def test_beta_zero_keeps_nothing(tmp_path: Path) -> None:
    for rank in (4, 0):
        module, seen = run(tmp_path / "cache", rank, 2, beta=0.0)
        assert module.reference is None
        assert seen.passes == [1, 1]
        assert seen.references[0].isnan().all()
    assert not (tmp_path / "cache").exists()


def test_none_keeps_nothing_and_auto_lies_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_data = PreferenceDataModule("survey", batch_size=2)
    trainer(tmp_path, 1).fit(module_of(4), module_data)  # tokenised before the cache of data is another's
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    trainer(tmp_path, 2, ReferenceCache("none")).fit(module_of(4), module_data)
    assert not list(tmp_path.rglob("*.safetensors"))
    trainer(tmp_path, 2, ReferenceCache()).fit(module_of(4), module_data)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.parents[1] == tmp_path / "hub" / "spl" / "reference"
    assert file.parent.name == f"{fingerprint(load_model('tiny'))}-float32"


def test_number_formats_have_folders_of_their_own(tmp_path: Path) -> None:
    weights, half = fingerprint(load_model("tiny")), fingerprint(load_model("tiny", torch.bfloat16))
    run(tmp_path, steps=4)
    _, low = run(tmp_path, steps=4, dtype="bfloat16")
    assert low.passes == [2] * 4
    mixed = Steps()
    trainer(tmp_path, 4, mixed, ReferenceCache(str(tmp_path)), precision="bf16-mixed").fit(
        module_of(4), PreferenceDataModule("survey", batch_size=2)
    )
    assert mixed.passes == [2] * 4
    names = {path.parent.name for path in kept(tmp_path)}
    assert names == {f"{weights}-float32", f"{half}-bfloat16", f"{weights}-float32-bf16-mixed"}
    _, again = run(tmp_path, steps=4, dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(low.references, again.references, strict=True))


def test_evaluation_finds_what_training_kept(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    (file,) = kept(tmp_path)
    module, before = module_of(4), Passes.count
    evaluation = trainer(tmp_path, -1, ReferenceCache(str(tmp_path)), limit_val_batches=1.0)
    evaluation.validate(module, PreferenceDataModule("survey", val_path="survey", batch_size=2), verbose=False)
    assert Passes.count - before == 4 + 1  # four batches, one check
    assert kept(tmp_path) == [file]


@RANKS
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "fresh"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, rank: int, shared: bool) -> None:
    whole, straight = run(tmp_path / "a", rank, 8)
    checkpoint, before = interrupted(tmp_path, str(tmp_path / "b"), rank, 3)
    (file,) = kept(tmp_path / "b")
    seen = {key for batch in before.batches for key in batch.response_keys}
    assert {bytes(key.tolist()) for key in load_file(file)["keys"]} == seen
    after, rest = run(tmp_path / ("b" if shared else "c"), rank, 8, ckpt_path=checkpoint)
    assert before.losses + rest.losses == straight.losses
    assert same(whole, after)


@pytest.mark.parametrize("when", ["checkpoint", "validation", "exception"])
def test_numbers_are_kept_before_the_end(tmp_path: Path, when: str) -> None:
    class Act(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                if when == "checkpoint":
                    trainer.save_checkpoint(tmp_path / "x.ckpt")
                if when != "exception":
                    assert len(kept(tmp_path)) == 1
                raise RuntimeError("pulled")

    options = {"limit_val_batches": 1, "val_check_interval": 2} if when == "validation" else {}
    data = PreferenceDataModule("survey", val_path="survey", batch_size=2)
    with pytest.raises(RuntimeError, match="pulled"):
        trainer(tmp_path, 3, Act(), ReferenceCache(str(tmp_path)), num_sanity_val_steps=0, **options).fit(
            module_of(4), data
        )
    assert len(kept(tmp_path)) == 1


def test_the_command_line(tmp_path: Path) -> None:
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    main([*TINY, *QUIET, "--output", str(runs / "a"), "--reference.cache", str(cache)])
    (file,) = kept(cache)
    assert len(load_file(file)["logps"]) == 22
    config = yaml.safe_load((runs / "a" / "config.yaml").read_text())
    assert config["reference"] == {"cache": str(cache)}
    before = Passes.count
    main(["fit", "--config", str(runs / "a" / "config.yaml"), "--output", str(runs / "b"), "--model.alpha", "0.2"])
    warm = Passes.count - before
    assert kept(cache) == [file]
    main([*TINY, *QUIET, "--output", str(runs / "c"), "--reference.cache", "none", "--model.alpha", "0.2"])
    assert Passes.count - before - warm > warm + 4
    assert kept(cache) == [file]
    ends = [json.loads((runs / name / "summary.json").read_text())["end"] for name in "bc"]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
