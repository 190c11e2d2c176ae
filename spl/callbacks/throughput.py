"""How fast training goes."""

import time
from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer


class ThroughputMonitor(Callback):
    """Logs `train/tokens_per_second`: distinct tokens through the network, over the last `window` batches, a process.

    Args:
        window: batches that the rate is taken over.
    """

    def __init__(self, window: int = 20) -> None:
        self.marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self.tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.marks:
            self.marks.append((time.perf_counter(), self.tokens))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += outputs["num_tokens"]
        self.marks.append((time.perf_counter(), self.tokens))
        (start, before), (now, tokens) = self.marks[0], self.marks[-1]
        pl_module.log(
            "train/tokens_per_second", (tokens - before) / max(now - start, 1e-9), prog_bar=True, batch_size=1
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks.clear()  # the pause is no training time
