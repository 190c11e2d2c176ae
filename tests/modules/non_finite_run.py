"""Short runs on pairs of which one is bad, and what their steps saw; as a script, runs of two processes.

`python non_finite_run.py FOLDER` forks two processes for each of RUNS; process R of a run writes what it saw into
FOLDER/NAME: weights-R.pt, steps-R.safetensors, and error-R.txt if it ended in an error. A last run, held_out,
only looks at pairs, of which the second process has the bad one and three others as a batch: found-R.json.
"""

import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.distributed.tensor import DTensor

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.rewards import RewardMonitor
from spl.data.base import PreferenceDataModule
from spl.modules.batch_file import write_batches
from spl.modules.preference import PreferenceModule
from spl.modules.sharding import ShardedStrategy
from spl.objective.loss import LossTerms
from spl.types import PreferenceBatch, StepOutput

STEPS = 4
LR, DECAY, CLIP = 1e-2, 0.1, 0.5


class Infinite(PreferenceModule):
    """The bad row's loss is infinite, its gradient is not: nothing that travels would tell another process of it."""

    def _evaluate(self, batch: PreferenceBatch) -> tuple[StepOutput, LossTerms]:
        output, terms = super()._evaluate(batch)
        more = math.inf if any("row 5" in row for row in batch.rows) else 0.0
        output["loss"] = output["loss"] + more
        return output, terms._replace(loss=terms.loss + more, losses=terms.losses + more)


class Batches(Callback):
    """Every micro-batch that was trained on, in order."""

    def __init__(self) -> None:
        self.seen: list[PreferenceBatch] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        self.seen.append(batch)


def write_pairs(path: Path, bad: float | None = 1e38, count: int = 8) -> Path:
    """Pairs; the fifth has an alpha that overflows a float32 loss (`bad`, which no reader could refuse)."""
    with path.open("w") as file:
        for k in range(1, count + 1):
            row = {"prompt": f"Say {k}", "chosen": f"good {k}" + "!" * k, "rejected": f"bad {k}"}
            file.write(json.dumps(row | ({"alpha": bad} if bad and k == 5 else {})) + "\n")
    return path


def make_module(kind: type[PreferenceModule] = PreferenceModule, **options: Any) -> PreferenceModule:
    torch.manual_seed(0)
    given = {"lora_rank": 4, "scorer": "forest", "lr": LR, "weight_decay": DECAY, "warmup": 0, "schedule": "constant"}
    return kind("tiny", alpha=1.0, **(given | options))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    given: dict[str, Any] = {"max_steps": STEPS, "gradient_clip_val": CLIP, "limit_val_batches": 0, "logger": False}
    return Trainer(
        accelerator="cpu", max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks), inference_mode=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, **(given | options),
    )  # fmt: skip


def trained(module: PreferenceModule) -> dict[str, torch.Tensor]:
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items() if module.get_parameter(name).requires_grad}


RUNS: dict[str, tuple[type[PreferenceModule], dict[str, Any], dict[str, Any]]] = {
    "stop": (PreferenceModule, {"on_non_finite": "stop"}, {"strategy": "ddp"}),
    "skip": (PreferenceModule, {"on_non_finite": "skip"}, {"strategy": "ddp", "accumulate_grad_batches": 2}),
    "infinite": (Infinite, {"on_non_finite": "skip"}, {"strategy": "ddp"}),
    "sharded": (Infinite, {"on_non_finite": "skip"}, {"strategy": ShardedStrategy()}),
}


def run(folder: Path, name: str) -> None:
    kind, options, trainer_options = RUNS[name]
    module, batches = make_module(kind, **options), Batches()
    rank = os.environ["LOCAL_RANK"]
    pairs = write_pairs(folder / f"pairs-{rank}.jsonl", 1e38 if kind is PreferenceModule else None)
    try:
        trainer = make_trainer(folder, batches, devices=2, **trainer_options)
        trainer.fit(module, PreferenceDataModule(str(pairs), batch_size=1))
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    write_batches(folder / f"steps-{rank}.safetensors", batches.seen)
    weights = trained(module) if not (folder / f"error-{rank}.txt").exists() else {}
    torch.save({"weights": weights, "skipped": module.guard.skipped}, folder / f"weights-{rank}.pt")


def look(folder: Path) -> None:
    rank = os.environ["LOCAL_RANK"]
    pairs = str(write_pairs(folder / f"pairs-{rank}.jsonl"))
    trainer = make_trainer(
        folder, RewardMonitor(), CalibrationMonitor(), devices=2, strategy="ddp", limit_val_batches=1.0
    )
    (found,) = trainer.validate(make_module(), PreferenceDataModule(pairs, val_path=pairs, batch_size=4), verbose=False)
    (folder / f"found-{rank}.json").write_text(json.dumps(dict(found)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in (*RUNS, "held_out"):
        (folder / name).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), NODE_RANK="0")
        children = []
        for rank in range(2):
            if not (child := os.fork()):
                os.environ["LOCAL_RANK"] = str(rank)
                try:
                    look(folder / name) if name == "held_out" else run(folder / name, name)
                finally:
                    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
