"""What a run writes about itself in its folder: metrics.csv as it goes, summary.json at the end."""

import csv
import hashlib
import io
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from spl.callbacks.summary import summary
from spl.disk import append, replacing

log = logging.getLogger(__name__)

_PACKAGES = ("spl", "torch", "lightning", "transformers", "peft", "datasets")


class MetricsLogger(CSVLogger):
    """`metrics.csv` in the run folder. It is added to, never begun anew: Lightning's own would delete it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self._told = False

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.save_dir)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """A full disk does not end the run: rows are kept until there is room."""
        try:
            self.experiment.save()
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning("metrics.csv could not be written (%s): its rows are kept until there is room.", error)
            self._told = True

    def log_hyperparams(self, params: Any = None) -> None:
        """config.yaml holds them."""


class _Writer(ExperimentWriter):
    """Rows are appended; the file is written anew, at once, where a column comes to it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        self.columns: list[str] = []  # that the file has
        if path.is_file():
            with path.open(newline="") as file:
                self.columns = next(csv.reader(file), [])

    def save(self) -> None:
        """Write what was logged; all of it stays for the next time where that fails.

        Raises:
            OSError: the file cannot be written; it is what it was.
        """
        if not self.metrics:
            return
        path, columns = Path(self.metrics_file_path), sorted(set(self.columns).union(*self.metrics))
        if columns == self.columns:
            append(path, _lines(columns, self.metrics))
        else:
            self._rewrite(path, columns)
        self.metrics = []

    def _rewrite(self, path: Path, columns: list[str]) -> None:
        rows: list[Any] = self.metrics
        if path.is_file():
            with path.open(newline="") as file:
                rows = [*csv.DictReader(file), *rows]
        with replacing(path) as file:
            file.write((_lines(columns, [dict(zip(columns, columns, strict=True))]) + _lines(columns, rows)).encode())
        self.columns = columns


def _lines(columns: list[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


class RunFolder(Callback):
    """Keeps start and end figures, writes `summary.json` when all else is done, and prints a short table.

    A figure's start is its first value in the run, its end the last.
    """

    def __init__(self) -> None:
        self.start: dict[str, float] = {}
        self._before: dict[str, float] = {}  # figures as they were logged last in the run that goes on
        self.began = 0.0
        self._first = True  # no batch has begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.start, self._before, self._first = {}, {}, True  # what a checkpoint knows is loaded after this

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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {"start": self.start, "last": self._before | _held_out(trainer)}
        checkpoint["callbacks"][self.state_key] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self._before = state_dict["start"], state_dict["last"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After every other callback's end of fit, the export among them."""
        if stage != "fit":
            return
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        end = self._before | _held_out(trainer)
        facts = {
            "finished": True,
            "steps": trainer.global_step,
            "seconds": round(time.perf_counter() - self.began, 1),
            "start": self.start,
            "end": end,
            "hashes": {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.glob("export/*.safetensors"))},
            "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        }
        with replacing(folder / "summary.json") as file:
            file.write(f"{json.dumps(facts, indent=2)}\n".encode())
        Console().print(summary(self.start, end))
        Console().print(f"Finished {trainer.global_step:,} steps in {facts['seconds']:,} s. Everything is in {folder}.")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _held_out(trainer: Trainer) -> dict[str, float]:
    """Figures on held-out data and samples by their names, as they were logged last."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
