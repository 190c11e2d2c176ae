"""A loss or gradient that is not finite: seen in every process, kept, and skipped without a trace, or the end."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import non_finite_run as runs
import pytest
import torch
from lightning import Callback, Trainer
from safetensors.torch import load_file

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.rewards import RewardMonitor
from spl.callbacks.start import StartReport
from spl.data.base import PreferenceDataModule
from spl.models import load_model, load_tokenizer
from spl.modules.batch_file import read_batches, write_batches
from spl.modules.non_finite import MOST_IN_A_ROW, MOST_SAVED, NonFiniteLossError
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.types import PreferenceBatch


def by_hand(
    steps: Sequence[Sequence[PreferenceBatch]], kind: type[PreferenceModule] = PreferenceModule
) -> dict[str, torch.Tensor]:
    """Weights after torch's own AdamW and clipping have taken the steps whose loss is finite, in a loop of our own."""
    module = runs.make_module(kind)
    module.configure_model()
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=runs.LR, weight_decay=runs.DECAY)
    for step in steps:
        losses = [module.loss_of(batch) for batch in step]
        if all(loss.isfinite() for loss in losses):
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(parameters, runs.CLIP)
            optimizer.step()
    return runs.trained(module)


def fit(folder: Path, *callbacks: Callback, bad: float | None = 1e38, seed: int = 1, **options: Any) -> Any:
    """The module after a run, and its trainer at `.trainer`."""
    trainer_options = {k: options.pop(k) for k in list(options) if k in ("max_steps", "accumulate_grad_batches")}
    data = PreferenceDataModule(str(runs.write_pairs(folder / "pairs.jsonl", bad)), batch_size=2, seed=seed)
    module = runs.make_module(**options)
    runs.make_trainer(folder, *callbacks, **trainer_options).fit(module, data)
    return module


def bad_steps(steps: Sequence[Sequence[PreferenceBatch]]) -> list[int]:
    return [k for k, step in enumerate(steps) if any("row 5" in row for batch in step for row in batch.rows)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_no_trace_in_the_weights(tmp_path: Path, accumulate: int) -> None:
    batches = runs.Batches()
    module = fit(tmp_path, batches, on_non_finite="skip", accumulate_grad_batches=accumulate)
    steps = [batches.seen[k : k + accumulate] for k in range(0, len(batches.seen), accumulate)]
    assert len(steps) == runs.STEPS
    bad = bad_steps(steps)
    assert 0 < bad[0] < runs.STEPS - 1  # so that there are moments to be spared, and to be used after
    expected = by_hand(steps)
    for name, weight in runs.trained(module).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    assert module.guard.skipped == len(bad) == accumulate  # an epoch has four batches
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = runs.make_module()
    other.configure_model()
    other.on_load_checkpoint(checkpoint)
    assert (other.guard.skipped, other.guard.in_a_row) == (len(bad), int(bad[-1] == runs.STEPS - 1))


def test_the_steps_batch_is_kept_and_shows_what_was_wrong(tmp_path: Path, tiny_tokenizer: Any) -> None:
    batches = runs.Batches()
    with pytest.raises(
        NonFiniteLossError, match=r"loss is not finite at step \d on [^;]*pairs\.jsonl, row 5\."
    ) as said:
        fit(tmp_path, batches, accumulate_grad_batches=2)
    (step,) = bad_steps([batches.seen[k : k + 2] for k in range(0, len(batches.seen), 2)])
    assert f"in {tmp_path}/non_finite as step={step}-*" in str(said.value)
    path = tmp_path / "non_finite" / f"step={step}-rank=0.safetensors"
    kept = read_batches(path)
    assert [batch.rows for batch in kept] == [batch.rows for batch in batches.seen[-2:]]
    bad = next(k for k, batch in enumerate(kept) if any("row 5" in row for row in batch.rows))
    module = runs.make_module()
    module.configure_model()
    assert not module.loss_of(kept[bad]).isfinite()
    assert module.loss_of(kept[1 - bad]).isfinite()
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["step"] == step
    example = next(e for e in told["micro_batches"][bad] if "row 5" in e["row"])
    assert not math.isfinite(float(example["loss"]))
    prompt = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 5"}], tokenize=False, add_generation_prompt=True
    )
    assert example["prompt"] == prompt
    assert example["responses"] == ["good 5!!!!!<|end|>", "bad 5<|end|>"]


def test_a_batch_survives_its_file(tmp_path: Path) -> None:
    batches = runs.Batches()
    fit(tmp_path, batches, bad=0.25, max_steps=1)
    write_batches(tmp_path / "a.safetensors", batches.seen)
    (again,) = read_batches(tmp_path / "a.safetensors")
    for name, value in batches.seen[0]._asdict().items():
        found = getattr(again, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == value, name


def test_a_gradient_that_is_not_finite_is_seen_where_the_loss_is(tmp_path: Path) -> None:
    # The good reply is longer, so its log-probability is below the other's: a loss of some 1e37, whose gradient's
    # norm is a root of a sum of squares beyond float32.
    batches = runs.Batches()
    module = fit(tmp_path, batches, bad=1e36, on_non_finite="skip")
    bad = next(batch for batch in batches.seen if any("row 5" in row for row in batch.rows))
    other = runs.make_module()
    other.configure_model()
    assert other.loss_of(bad).isfinite()
    assert module.guard.skipped == 1
    assert all(weight.isfinite().all() for weight in runs.trained(module).values())
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite at step \d of .*row 5.*every loss is"):
        fit(tmp_path, bad=1e36)


def test_skipping_has_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One step of so high a rate, and no loss is a number again, though every weight is."""
    with (
        caplog.at_level("INFO", logger="spl"),
        pytest.raises(NonFiniteLossError, match=f"It is the {MOST_IN_A_ROW + 1}th in a row"),
    ):
        fit(tmp_path, bad=None, lr=1e30, on_non_finite="skip", max_steps=50)
    assert caplog.text.count("The step is skipped") == MOST_IN_A_ROW
    assert sum(record.levelname == "WARNING" for record in caplog.records if "skipped" in record.message) == 1
    assert len(list((tmp_path / "non_finite").glob("*.safetensors"))) == MOST_SAVED
    assert len(list((tmp_path / "non_finite").glob("*.json"))) == MOST_SAVED


class Poison(Callback):
    """Writes NaN into a frozen weight at step 2."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        if trainer.global_step == 2:
            pl_module.policy.get_input_embeddings().weight.data[0] = math.nan


def test_weights_that_are_not_finite_end_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"at step 2 on .* The weights are not finite either"):
        fit(tmp_path, Poison(), bad=None, on_non_finite="skip")


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path: Path) -> None:
    (tmp_path / "non_finite").write_text("a file where the folder would be")
    with pytest.raises(NonFiniteLossError, match=r"row 5\. Its batch could not be saved in .*"):
        fit(tmp_path)


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_a_model_whose_weights_are_no_numbers_is_refused_before_step_1(tmp_path: Path, on_non_finite: Any) -> None:
    broken = load_model("tiny")
    broken.get_input_embeddings().weight.data[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer("tiny").save_pretrained(tmp_path / "broken")
    module = PreferenceModule(str(tmp_path / "broken"), on_non_finite=on_non_finite)
    with pytest.raises(NonFiniteLossError, match=r"not finite before step 1, since the weights of .*broken are not"):
        runs.make_trainer(tmp_path, StartReport()).fit(module, PreferenceDataModule("survey"))
    assert not (tmp_path / "non_finite").exists()


def test_a_bad_row_in_the_longest_batch_is_named_before_step_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = "the loss of the longest batch is not finite before step 1, on one or more of"
    data = PreferenceDataModule(str(runs.write_pairs(tmp_path / "pairs.jsonl", count=5)), batch_size=1, seed=4)
    with pytest.raises(NonFiniteLossError, match=rf"{sentence} .*row 5"):
        runs.make_trainer(tmp_path, StartReport()).fit(runs.make_module(), data)
    with caplog.at_level("WARNING", logger="spl"):
        runs.make_trainer(tmp_path, StartReport()).fit(runs.make_module(on_non_finite="skip"), data)
    assert sentence[1:] in caplog.text


def validate(folder: Path, module: Any, path: Path, *callbacks: Callback) -> dict[str, float]:
    trainer = runs.make_trainer(folder, *callbacks, limit_val_batches=1.0)
    data = PreferenceDataModule(str(path), val_path=str(path), batch_size=1)
    (found,) = trainer.validate(module, data, verbose=False)
    return dict(found)


def test_held_out_rows_without_a_finite_loss_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Of the good rows alone, by a file without the bad one.
    path = runs.write_pairs(tmp_path / "all.jsonl")
    good = tmp_path / "good.jsonl"
    good.write_text("".join(line for line in path.read_text().splitlines(True) if "alpha" not in line))
    monitors = [CalibrationMonitor, RewardMonitor]
    expected = validate(tmp_path, runs.make_module(), good, *(m() for m in monitors))
    with caplog.at_level("WARNING", logger="spl"):
        found = validate(tmp_path, runs.make_module(), path, *(m() for m in monitors))
    assert "The loss of 1 held-out examples is not finite" in caplog.text
    assert "all.jsonl, row 5. " in caplog.text
    assert (expected.pop("val/non_finite"), found.pop("val/non_finite")) == (0, 1)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", [PreferenceModule, SFTModule])
def test_held_out_data_without_any_finite_loss_end_the_run(tmp_path: Path, kind: Any) -> None:
    module = kind("tiny")
    module.configure_model()
    module.policy.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"on none of the held-out batches: not on .*row 1;.* and 3 more"):
        validate(tmp_path, module, runs.write_pairs(tmp_path / "a.jsonl"))


@pytest.fixture(scope="module")
def pairs_of_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of two processes left; in each, one process alone sees the bad row."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).with_name("non_finite_run.py"))
    subprocess.run([sys.executable, script, str(folder)], check=True, timeout=240, env=os.environ, capture_output=True)
    return folder


def test_all_processes_stop_where_one_has_a_bad_row(pairs_of_processes: Path) -> None:
    folder = pairs_of_processes / "stop"
    said = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert all("NonFiniteLossError: the loss is not finite at step" in text and "row 5." in text for text in said)
    found = [
        [any("row 5" in row for row in b.rows) for b in read_batches(f)] for f in sorted(folder.rglob("non*/*.s*"))
    ]
    assert sorted(found) == [[False], [True]]


@pytest.mark.parametrize(("name", "accumulate"), [("skip", 2), ("infinite", 1), ("sharded", 1)])
def test_all_processes_skip_where_one_has_a_bad_row(pairs_of_processes: Path, name: str, accumulate: int) -> None:
    folder = pairs_of_processes / name
    ranks = [read_batches(folder / f"steps-{rank}.safetensors") for rank in range(2)]
    starts = range(0, len(ranks[0]), accumulate)
    steps = [[batch for seen in ranks for batch in seen[k : k + accumulate]] for k in starts]
    ends = [torch.load(folder / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    expected = by_hand(steps, PreferenceModule if name == "skip" else runs.Infinite)
    assert ends[0]["skipped"] == ends[1]["skipped"] == accumulate
    for name_, weight in ends[0]["weights"].items():
        torch.testing.assert_close(weight, expected[name_], atol=2e-6, rtol=1e-5)
        assert torch.equal(weight, ends[1]["weights"][name_])
    assert load_file(next(folder.rglob("non_finite/*.safetensors")))


def test_a_process_whose_held_out_batches_are_all_left_out_is_no_dead_end(
    pairs_of_processes: Path, tmp_path: Path
) -> None:
    expected = validate(
        tmp_path,
        runs.make_module(),
        runs.write_pairs(tmp_path / "good.jsonl", count=4),
        RewardMonitor(),
        CalibrationMonitor(),
    )
    for rank in range(2):
        found = json.loads((pairs_of_processes / "held_out" / f"found-{rank}.json").read_text())
        assert found.pop("val/non_finite") == 1
        assert found == pytest.approx({k: v for k, v in expected.items() if k != "val/non_finite"}, rel=1e-5)
