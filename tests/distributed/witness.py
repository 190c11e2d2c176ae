"""What a process saw of its training: losses of micro-batches, and how often gradients were reduced."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from spl.types import PreferenceBatch


class Witness(Callback):
    """Writes PATH.RANK.json: for every micro-batch its step, mean loss, number of examples, and reduce-scatters."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seen: dict[str, list[Any]] = {"steps": [], "losses": [], "examples": [], "reductions": []}
        # torch 2.13 has a new name for it.
        self._name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        self._plain = getattr(dist, self._name)
        self._count = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        setattr(dist, self._name, self._reduce_scatter)

    def _reduce_scatter(self, *args: Any, **kwargs: Any) -> Any:
        self._count += 1
        return self._plain(*args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._count = 0
        self.seen["steps"].append(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        self.seen["losses"].append(outputs["objective"].item())
        self.seen["examples"].append(batch.num_examples)
        self.seen["reductions"].append(self._count)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        setattr(dist, self._name, self._plain)
        self.path.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(self.seen))
