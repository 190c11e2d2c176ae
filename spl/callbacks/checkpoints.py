"""When checkpoints are saved, which of them stay, and what becomes of a run that is asked to stop."""

import logging
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from spl.callbacks.interrupt import InterruptedTrainingError, Signals
from spl.callbacks.run_logs import lengths
from spl.checkpoints import peek
from spl.disk import sweep
from spl.types import UserError

log = logging.getLogger(__name__)

_KEY = "log"  # of what a checkpoint says of the run's logs


class UnsavedRunError(Exception):
    """What training ends with, the last checkpoint or the export, could not be written."""


class Checkpoints(Callback):
    """Saves `checkpoints/step=N.ckpt` at intervals, after the last step, and when a signal asks the run to stop.

    `last.ckpt` is a link to the newest. A checkpoint is of the end of a step, also where it is taken later, before the
    next step: Lightning's counters go in as they stood then, so what is to follow the step (a validation, a round of
    samples) does so in the run that goes on. What was logged by then is on the disk before. A write that fails is told,
    and the run goes on and tries again at the next interval.

    SIGTERM, SIGUSR1 and Ctrl-C end training with InterruptedTrainingError when the step is finished. A validation or a
    round of samples is broken off (with several processes before its next batch, or before the round).

    Args:
        every_n_train_steps: optimiser steps between checkpoints; 0 saves after the last alone.
        keep: newest checkpoints that stay.
    """

    def __init__(self, every_n_train_steps: int = 100, keep: int = 2) -> None:
        if every_n_train_steps < 0 or keep < 1:
            raise UserError(
                "checkpoint.every_n_train_steps must be 0 or more, and checkpoint.keep 1 or more; they are "
                f"{every_n_train_steps} and {keep}."
            )
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.signals = Signals()
        self._saved = -1  # step
        self._due = False  # a checkpoint of the step that has just ended
        self._end: dict[str, Any] = {}  # what a checkpoint says of that step's end, whenever it is taken
        self._unlogged = False  # no logger has that step's own metrics yet
        self._agreed = False  # all processes stop after that step
        self._row: dict[str, float] = {}  # those metrics, where a checkpoint has to carry them
        self._lengths: dict[str, int] | None = None  # of the logs, when a pause between two steps began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved, self._due, self._unlogged, self._agreed = -1, False, False, False
        self._end, self._row, self._lengths = {}, {}, None
        if stage == "fit" and trainer.is_global_zero:
            sweep(_folder(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._row = checkpoint.get(_KEY, {}).get("row", {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self._end)
        logs = _lengths(trainer) if self._lengths is None else self._lengths
        checkpoint[_KEY] = {"row": self._row, "logs": logs}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.listen()
        if self._row:
            _log(trainer, self._row)
            self._row = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._end = {"loops": _counters(trainer), "epoch": trainer.current_epoch}
        self._unlogged = True
        every = self.every_n_train_steps
        self._due = every > 0 and trainer.global_step % every == 0
        data: Any = getattr(trainer, "datamodule", None)
        if self._due and data is not None and (state := data.state_dict()):
            self._end[type(data).__qualname__] = state  # a stream counts the next batch as soon as it is drawn
        self._stop_if_asked(trainer)

    def on_sampling_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._pause(trainer)

    def on_sampling_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._step_is_over(trainer)
            self._pause(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit" and not self._in_the_middle(trainer):
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_is_over(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_is_over(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = self._saved != trainer.global_step and bool(self._end)
        if failure := self._step_is_over(trainer):
            raise UnsavedRunError(
                f"all {trainer.global_step:,} steps are done, but {failure}: mend that, and run "
                "the same command with --resume."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.interruptible = trainer.world_size == 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        received, between_steps = self.signals.received, self._agreed or self.signals.interruptible
        self.signals.interruptible = False  # a signal that reaches this process after another finds it saving
        try:
            if isinstance(exception, InterruptedTrainingError):
                self._tell(trainer, exception, save=between_steps)
            elif received and between_steps:
                # Code in C, which was at work when the signal came, has made another exception of it.
                stop = InterruptedTrainingError(received)
                self._tell(trainer, stop, save=True)
                raise stop from exception
        finally:
            self.signals.restore()

    def _tell(self, trainer: Trainer, exception: InterruptedTrainingError, save: bool) -> None:
        """Save the last step's end, and have the exception say what is saved of it."""
        exception.step, exception.folder = trainer.global_step or None, Path(trainer.default_root_dir)
        if save and self._end and self._saved != trainer.global_step:
            self._row = _metrics_of_step(trainer) if self._unlogged else {}
            exception.unsaved = self._save(trainer)
            if self._row:  # for people; the run that goes on has it from the checkpoint
                _log(trainer, self._row)
        if self._saved == trainer.global_step:
            exception.checkpoint = _path(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Stop where any process was asked to."""
        asked = self.signals.received is not None
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            self._agreed, self.signals.interruptible = True, False
            # Another process's signal, where this one has none, is taken for the usual one.
            raise InterruptedTrainingError(self.signals.received or 15)

    def _pause(self, trainer: Trainer) -> None:
        """Until the next step nothing would be lost but what the pause logs, which is cut off again."""
        if self._in_the_middle(trainer):
            return
        self._stop_if_asked(trainer)
        try:
            self._lengths = _lengths(trainer)
        except OSError:
            return  # not to be broken off: what was logged is not on the disk
        self.signals.interruptible = trainer.world_size == 1

    def _in_the_middle(self, trainer: Trainer) -> bool:
        """Whether some of a step's micro-batches are done, whose gradient would be lost."""
        loop = trainer.fit_loop.epoch_loop
        return loop.batch_progress.current.ready > 0 and loop._should_accumulate()

    def _resume(self) -> None:
        self.signals.interruptible, self._lengths = False, None

    def _step_is_over(self, trainer: Trainer) -> str:
        """Save what is due, when the loggers have the step's metrics; why it failed, if it did."""
        self._resume()
        due, self._due, self._unlogged = self._due, False, False
        return self._save(trainer) if due else ""

    def _save(self, trainer: Trainer) -> str:
        """Save the end of the last step; why that failed, if it did."""
        path, failure = _path(trainer), ""
        try:
            self._lengths = _lengths(trainer) if self._lengths is None else self._lengths
        except OSError as error:
            failure = f"a log could not be written ({error})"
        if not self._failed_anywhere(trainer, failure):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
            try:
                trainer.strategy.save_checkpoint(checkpoint, path)
                if trainer.is_global_zero:
                    _link(path)
            except OSError as error:
                failure = f"{path} could not be written ({error.strerror or error})"
            if not self._failed_anywhere(trainer, failure):
                self._saved, self._lengths = trainer.global_step, None
                self._prune(trainer)
                return ""
        failure = failure or "another process could not write its part of the checkpoint"
        self._lengths = None
        log.warning("%s; the checkpoints before it stay.", failure)
        return failure

    def _failed_anywhere(self, trainer: Trainer, failure: str) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(failure), all=False)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            named = [(path.stem.removeprefix("step="), path) for path in _folder(trainer).glob("step=*.ckpt")]
            ours = sorted((int(step), path) for step, path in named if step.isdecimal())
            for _, path in ours[: -self.keep]:
                path.unlink(missing_ok=True)


def logs_of(checkpoint: Path) -> dict[str, int]:
    """How long the run's logs were when a checkpoint was taken."""
    logs: dict[str, int] = peek(checkpoint)[_KEY]["logs"]
    return logs


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _lengths(trainer: Trainer) -> dict[str, int]:
    return lengths(trainer) if trainer.is_global_zero else {}


def _path(trainer: Trainer) -> Path:
    return _folder(trainer) / f"step={trainer.global_step}.ckpt"


def _link(path: Path) -> None:
    """Let last.ckpt be a checkpoint, at once."""
    link = path.with_name(".writing-last")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name("last.ckpt"))


def _counters(trainer: Trainer) -> dict[str, Any]:
    """Lightning's, at the end of a step."""
    counters = trainer._checkpoint_connector._get_loops_state_dict()
    for part in counters["fit_loop"]["epoch_progress"].values():
        # In a run that went on from an epoch's end Lightning lags behind with these, and would repeat this epoch.
        part["ready"] = part["started"] = part["processed"] + 1
    return counters


def _log(trainer: Trainer, row: dict[str, float]) -> None:
    metrics: Any = dict(row)  # Lightning takes plain numbers, too
    trainer._logger_connector.log_metrics(metrics)


def _metrics_of_step(trainer: Trainer) -> dict[str, float]:
    """What Lightning will give to the loggers after this hook; empty where it will not."""
    connector = trainer._logger_connector
    if not (connector.should_update_logs and trainer.loggers):
        return {}
    logged = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"epoch": trainer.current_epoch} | logged if logged else {}
