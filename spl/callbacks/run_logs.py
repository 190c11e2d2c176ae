"""A run's logs: what a full disk does to them, and how long they are.

A run that goes on cuts off what a killed one wrote after its checkpoint.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from spl.callbacks.run_folder import MetricsLogger

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


class EventsLogger(TensorBoardLogger):
    """TensorBoard's events in `tensorboard/` of the run folder. A full disk costs events, which metrics.csv has too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="tensorboard", version="", default_hp_metric=False)  # or each start adds one
        self._told = False
        threading.excepthook = _but_for_events

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with self._spared():
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with self._spared():
            super().save()

    def flush(self) -> None:
        with self._spared():
            self.experiment.flush()

    def finalize(self, status: str) -> None:
        with self._spared():
            super().finalize(status)

    @contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as found:
            error = found if isinstance(found, OSError) else found.__cause__  # Lightning wraps some
            if not isinstance(error, OSError):
                raise
            self._experiment = None  # its thread is dead; the next one begins a file
            if not self._told:
                log.warning("TensorBoard's events could not be written (%s): some will be missing.", error)
            self._told = True


def _but_for_events(thread: threading.ExceptHookArgs) -> None:
    """No page of traceback from the thread that writes events: the logger says what became of them."""
    if not (thread.thread and type(thread.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(thread)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Let a run go on where something that only shows it cannot be written."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be written (%s); the run goes on.", what, error)


def lengths(trainer: Trainer) -> dict[str, int]:
    """Rows of metrics.csv, and bytes of the run folder's other logs, which are brought to the disk first.

    Raises:
        OSError: one of them cannot be written.
    """
    folder = Path(trainer.default_root_dir)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLogger):
            logger.experiment.save()
        elif isinstance(logger, EventsLogger):
            logger.flush()
    found = {}
    for path in logs_in(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            length = sum(1 for _ in file) - 1 if path.name == METRICS else path.stat().st_size
        found[str(path.relative_to(folder))] = length
    return found


def rewind(folder: Path, known: Mapping[str, int]) -> None:
    """Cut the logs back to what `lengths` found; those that it did not find are removed."""
    for path in list(logs_in(folder)):
        length = known.get(str(path.relative_to(folder)))
        if length is None:
            path.unlink()
        else:
            end = _end_of_row(path, length) if path.name == METRICS else length
            if end < path.stat().st_size:
                os.truncate(path, end)


def logs_in(folder: Path) -> Iterator[Path]:
    """Files that only grow; of metrics.csv only the rows are so, since a new column is one for all.

    By their full names, for they are cut: a user may keep other files in the folder.
    """
    for pattern in (METRICS, "samples.jsonl", "quarantine.jsonl", "tensorboard/events.*"):
        yield from folder.glob(pattern)


def _end_of_row(path: Path, number: int) -> int:
    """Bytes up to the end of a row; row 0 is the header. Cells are numbers, so that a line is a row."""
    with path.open("rb") as file:
        return sum(len(line) for _, line in zip(range(number + 1), file, strict=False))
