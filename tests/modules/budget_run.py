"""Short runs on pairs of very different lengths, and what their optimiser steps saw; as a script, runs under DDP.

`python budget_run.py FOLDER` trains on FOLDER/pairs.jsonl once for each entry {name: options of `run`} of
FOLDER/runs.json; process R writes what it saw to FOLDER/NAME-R.pt.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer

from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.types import PreferenceBatch

Kind = Literal["lora", "full", "sft", "unweighted"]


class Unweighted(PreferenceModule):
    """Takes micro-batches for equals."""

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Any:
        return super().training_step(batch._replace(weight=1.0), batch_idx)


class Steps(Callback):
    """What the optimiser steps of a process were made of."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[str, ...]]] = []  # of every micro-batch of every step
        self.tokens: list[list[int]] = []
        self.weights: list[list[float]] = []
        self.gradient = torch.zeros(0)  # of the first step
        self.accumulated = 0
        self._batches: list[PreferenceBatch] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accumulated = trainer.accumulate_grad_batches
        if trainer.global_step == 0:
            # Away from the start, where half of LoRA has no gradient and policy and reference are one.
            generator = torch.Generator().manual_seed(0)
            for p in pl_module.parameters():
                if p.requires_grad:
                    p.data += 0.02 * torch.randn(p.shape, generator=generator)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        self._batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rows.append([batch.rows for batch in self._batches])
        self.tokens.append([batch.num_tokens for batch in self._batches])
        self.weights.append([batch.weight for batch in self._batches])
        self._batches = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.rows and not self.gradient.numel():  # as the step took it
            self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])


def write_pairs(path: Path, count: int = 26) -> Path:
    """Pairs of which most are short; the longest has 137 tokens."""
    draw = random.Random(0)
    with path.open("w") as file:
        for k in range(count):
            size = int(200 ** draw.uniform(0.4, 0.95)) // 3
            texts = ["".join(draw.choices("abcdefgh ", k=size)) for _ in range(3)]
            row = {"prompt": f"{k} {texts[0]}", "responses": [f"y{texts[1]}", f"n{texts[2]}"], "ranking": [0, 1]}
            file.write(json.dumps(row) + "\n")
    return path


def make_module(kind: Kind = "lora") -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"scorer": "forest", "lr": 1e-3, "lora_rank": 0 if kind == "full" else 4}
    if kind == "sft":
        return SFTModule("tiny", **options)
    return (Unweighted if kind == "unweighted" else PreferenceModule)("tiny", alpha=1.0, **options)


def make_trainer(folder: Path, *callbacks: Callback, steps: int = 4, accumulate: int = 1, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **options,
    )


def run(
    path: Path, kind: Kind = "lora", accumulate: int = 1, trainer_options: Any = None, **options: Any
) -> tuple[Steps, Trainer]:
    """Train for four steps, the last in a second epoch; the options are the data module's."""
    seen = Steps()
    trainer = make_trainer(path.parent, seen, accumulate=accumulate, **(trainer_options or {}))
    trainer.fit(make_module(kind), PreferenceDataModule(str(path), **options))
    return seen, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, options in json.loads((folder / "runs.json").read_text()).items():
        seen, trainer = run(folder / "pairs.jsonl", trainer_options={"devices": 2, "strategy": "ddp"}, **options)
        saved = {key: getattr(seen, key) for key in ("gradient", "rows", "tokens", "weights", "accumulated")}
        torch.save(saved, folder / f"{name}-{trainer.global_rank}.pt")
