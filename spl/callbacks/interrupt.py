"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class InterruptedTrainingError(Exception):
    """Training was asked to stop and has saved a checkpoint."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; saved {checkpoint}")
        self.signum = signum
        self.checkpoint = checkpoint


class InterruptCheckpoint(Callback):
    """Saves `checkpoints/last.ckpt` when a signal asks the run to stop; a second signal stops it at once.

    The checkpoint is taken between two optimiser steps, so that no gradient is lost. Training ends with
    InterruptedTrainingError.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signum = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        log.warning("%s: finishing the step, then saving. Again to stop at once.", signal.Signals(signum).name)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.fit_loop.epoch_loop
        if epoch._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False):
            return
        if epoch.batch_progress.is_last_batch and trainer.num_training_batches == float("inf"):
            return  # Lightning would count on from a stream's last batch when it goes on: take one step more
        # What comes after this hook: the step's own metrics, which the run that goes on will not log again.
        trainer._logger_connector.on_batch_end()
        trainer._logger_connector.update_train_step_metrics()
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        raise InterruptedTrainingError(self.signum or signal.SIGTERM, trainer.global_step, path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
