"""Training under a budget of tokens: an optimiser step is the one that a single large batch would take."""

import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import budget_run
import pytest
import torch
from budget_run import Kind, Steps, make_module, make_trainer, run, write_pairs
from lightning import Callback, LightningModule, Trainer

from spl.callbacks.checkpoints import Checkpoints
from spl.callbacks.interrupt import InterruptedTrainingError
from spl.data.base import PreferenceDataModule
from spl.data.collate import collate

BUDGET = 137  # tokens of the longest pair


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("budget") / "pairs.jsonl")


def steps_of(rows: Any) -> list[list[str]]:
    return [sorted(chain.from_iterable(step)) for step in rows]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()


def uneven(seen: Steps) -> bool:
    """Whether the first step would come out differently if its micro-batches were taken for equals."""
    return len({len(rows) for rows in seen.rows[0]}) > 1


@pytest.mark.parametrize("kind", ["lora", "full", "sft"])
def test_a_step_under_a_budget_is_the_step_of_one_batch(path: Path, kind: Kind) -> None:
    whole, _ = run(path, kind, batch_size=8)
    assert max(chain.from_iterable(whole.tokens)) > 3 * BUDGET
    for accumulate, batch_size in ((1, 8), (2, 4)):
        parts, trainer = run(path, kind, accumulate, batch_size=batch_size, max_tokens=BUDGET)
        assert parts.accumulated > 2
        assert [len(step) for step in parts.rows] == [parts.accumulated] * 4
        assert trainer.global_step == 4
        assert trainer.accumulate_grad_batches == accumulate
        assert steps_of(parts.rows) == steps_of(whole.rows)
        assert max(chain.from_iterable(parts.tokens)) <= BUDGET
        train: Any = trainer.datamodule.train  # type: ignore[attr-defined]
        bounds = {train[k].row: int(train.num_tokens[k]) for k in range(len(train))}
        assert max(sum(bounds[row] for row in rows) for step in parts.rows for rows in step) <= BUDGET
        assert uneven(parts)
        assert gap(parts.gradient, whole.gradient) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "full", "sft"])
@pytest.mark.parametrize("budget", [None, 400])
def test_grouping_by_length_changes_no_gradient(path: Path, kind: Kind, budget: int | None) -> None:
    whole, _ = run(path, kind, batch_size=8)
    parts, trainer = run(path, kind, 2, batch_size=4, group_by_length=True, max_tokens=budget)
    assert (parts.accumulated, trainer.accumulate_grad_batches, trainer.global_step) == (2, 2, 4)
    assert steps_of(parts.rows) == steps_of(whole.rows)
    assert uneven(parts)
    assert gap(parts.gradient, whole.gradient) < 1e-6
    plain, _ = run(path, kind, 2, batch_size=4)
    assert gap(plain.gradient, whole.gradient) < 1e-6
    spread = [[max(tokens) - min(tokens) for tokens in seen.tokens] for seen in (parts, plain)]
    assert sum(spread[0]) < sum(spread[1]) / 4


def test_the_gradient_is_the_mean_of_the_examples_own(path: Path) -> None:
    """By one backward pass for each example, without a Trainer's arithmetic."""
    seen, trainer = run(path, batch_size=8, max_tokens=BUDGET)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    number = {data.train[k].row: k for k in range(len(data.train))}
    module = make_module()
    module.configure_model()
    Steps().on_train_start(make_trainer(path.parent), module)  # moves the weights as it did in the run
    for row in steps_of(seen.rows)[0]:
        module.loss_of(collate([data.train[number[row]]])).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]) / 8
    assert gap(seen.gradient, gradient) < 1e-6


def test_without_its_weight_a_step_would_be_another(path: Path) -> None:
    whole, _ = run(path, batch_size=8)
    parts, _ = run(path, "unweighted", batch_size=8, max_tokens=BUDGET)
    assert gap(parts.gradient, whole.gradient) > 0.05


def test_two_processes_take_the_step_of_one(path: Path, tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "pairs.jsonl").write_bytes(path.read_bytes())
    runs: dict[str, Any] = {
        "budget": {"batch_size": 4, "max_tokens": BUDGET},
        "full": {"kind": "full", "batch_size": 4, "max_tokens": BUDGET},
        "sft": {"kind": "sft", "batch_size": 4, "max_tokens": BUDGET},
        "grouped": {"batch_size": 2, "accumulate": 2, "group_by_length": True},
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, budget_run.__file__, str(folder)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    whole = {kind: run(folder / "pairs.jsonl", kind, batch_size=8)[0] for kind in ("lora", "full", "sft")}
    for name, options in runs.items():
        one = whole[options.get("kind", "lora")]
        ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        together = [[*a, *b] for a, b in zip(*(rank["rows"] for rank in ranks), strict=True)]
        assert steps_of(together) == steps_of(one.rows), name
        assert len({len(rows) for rows in together[0]}) > 1, name
        assert {len(step) for rank in ranks for step in rank["rows"]} == {ranks[0]["accumulated"]}
        if "max_tokens" in options:
            assert ranks[0]["accumulated"] > 1
            assert max(chain.from_iterable(chain.from_iterable(rank["tokens"] for rank in ranks))) <= BUDGET
        for rank in ranks:
            assert gap(rank["gradient"], one.gradient) < 1e-6, name


class Stop(Callback):
    """Asks the run to stop, as a signal would, at the second micro-batch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches += trainer.global_step == self.step - 1
        if self.batches == 2:
            self.batches += 1
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("done", [2, 3], ids=["mid-epoch", "end-of-epoch"])
def test_an_interrupted_run_goes_on_bit_for_bit(path: Path, tmp_path: Path, done: int) -> None:
    def fit(*callbacks: Callback, **options: Any) -> tuple[Steps, Any]:
        seen, module = Steps(), make_module()
        trainer = make_trainer(tmp_path, seen, *callbacks, steps=6)
        if callbacks:
            with pytest.raises(InterruptedTrainingError, match=f"after step {done}"):
                trainer.fit(module, PreferenceDataModule(str(path), batch_size=8, max_tokens=BUDGET))
        else:
            trainer.fit(module, PreferenceDataModule(str(path), batch_size=8, max_tokens=BUDGET), **options)
        return seen, module

    straight, whole = fit()
    before, _ = fit(Stop(done), Checkpoints())
    after, resumed = fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(before.rows) == done
    assert straight.accumulated > 2
    assert before.rows + after.rows == straight.rows
    assert before.weights + after.weights == straight.weights
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_failed_run_leaves_nothing_behind(path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("stopped")

    data, trainer, seen = (
        PreferenceDataModule(str(path), batch_size=8, max_tokens=BUDGET),
        make_trainer(path.parent),
        Steps(),
    )
    trainer.callbacks.append(Fail())
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(make_module(), data)
    make_trainer(path.parent, seen).fit(make_module(), data)
    assert max(chain.from_iterable(seen.tokens)) <= BUDGET
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize(
    ("steps", "budget"), [(2, BUDGET), (6, 2 * BUDGET), (6, None)], ids=["longer", "budget", "none"]
)
def test_a_resumed_run_may_have_other_micro_batches(path: Path, tmp_path: Path, steps: int, budget: int | None) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2 and not trainer.fit_loop.epoch_loop._should_accumulate():
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def fit(steps: int, max_tokens: int | None, *callbacks: Callback, **options: Any) -> Steps:
        data = PreferenceDataModule(str(path), batch_size=8, max_tokens=max_tokens)
        make_trainer(tmp_path, seen := Steps(), *callbacks, steps=steps).fit(make_module(), data, **options)
        return seen

    straight = fit(6, BUDGET)
    before = fit(steps, budget, Save())
    assert before.accumulated != straight.accumulated
    after = fit(6, BUDGET, ckpt_path=tmp_path / "a.ckpt")
    assert steps_of(after.rows) == steps_of(straight.rows)[2:]
