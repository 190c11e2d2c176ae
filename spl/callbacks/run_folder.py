"""Everything a run writes about itself in one folder: metrics.csv, summary.json, the last checkpoint."""

import csv
import hashlib
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from rich.console import Console

from spl.callbacks.summary import summary

_PACKAGES = ("spl", "torch", "lightning", "transformers", "peft", "datasets")


class MetricsLogger(CSVLogger):
    """`metrics.csv` in the run folder. It is added to, never begun anew: Lightning's own would delete it.

    Args:
        folder: of the run.
        resume: rows from the step that is logged first are written again, so those of a killed run give way.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self.resume = resume

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.save_dir, self.resume)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """config.yaml holds them."""


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, resume: bool) -> None:
        super().__init__(log_dir)
        self.resume = resume

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if self.resume and step is not None:
            self._drop_from(step)
            self.resume = False
        super().log_metrics(metrics_dict, step)

    def _drop_from(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.metrics_keys)
                writer.writeheader()
                writer.writerows(rows)


class RunFolder(Callback):
    """Keeps start and end figures, saves the last checkpoint, writes `summary.json` and prints a short table.

    A figure's start is its first value in the run, its end the last.
    """

    def __init__(self) -> None:
        self.start: dict[str, float] = {}
        self.began = 0.0
        self._first = True  # no batch has begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.start, self._first = {}, True  # what a checkpoint knows is loaded after this

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first:  # what monitors log before step 1, by whatever order
            self._keep_start(trainer)
            self._first = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep_start(trainer)

    def _keep_start(self, trainer: Trainer) -> None:
        self.start = _held_out(trainer) | self.start

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After every other callback's end of fit, the export among them."""
        if stage != "fit":
            return
        if not self.began:  # a finished run was resumed: nothing was trained
            Console().print(
                f"{trainer.default_root_dir} is finished: {trainer.global_step:,} steps. Nothing to resume."
            )
            return
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        end = _held_out(trainer)
        facts = {
            "finished": True,
            "steps": trainer.global_step,
            "seconds": round(time.perf_counter() - self.began, 1),
            "start": self.start,
            "end": end,
            "hashes": {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.glob("export/*.safetensors"))},
            "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
        Console().print(summary(self.start, end))
        Console().print(f"Finished {trainer.global_step:,} steps in {facts['seconds']:,} s. Everything is in {folder}.")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _held_out(trainer: Trainer) -> dict[str, float]:
    """Figures on held-out data and samples by their names, as they were logged last."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
