"""Where monitors write: numbers and pictures, to every logger of the trainer and to the run folder, at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from spl.callbacks.run_logs import spared


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log values of the present weights, under any hook, whatever `log_every_n_steps` is; also for ModelCheckpoint.

    They stand at the step that Lightning gives to the other figures of these weights. Every process must call it with
    the same values.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), _step(trainer))
        logger.save()


def _step(trainer: Trainer) -> int:
    """Lightning counts logged steps from 0: what the n-th optimiser step made is at n - 1."""
    return max(trainer.global_step - 1, 0)


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Save a picture as `figures/NAME.png` of the run folder, and give it to the loggers that take pictures.

    Only in training: a checkpoint that is looked at later leaves the pictures of its run alone.
    """
    if not trainer.is_global_zero or trainer.state.fn != "fit":
        return
    path = Path(trainer.default_root_dir) / "figures" / f"{name}.png"
    with spared(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        for logger in trainer.loggers:
            backend: Any = logger
            if isinstance(logger, TensorBoardLogger):
                backend.experiment.add_figure(name, figure, _step(trainer), close=False)
            elif hasattr(backend, "log_image"):  # W&B, and others of its kind
                backend.log_image(key=name, images=[str(path)], step=_step(trainer))


def log_table(trainer: Trainer, name: str, columns: list[str], rows: list[list[str]]) -> None:
    """Give a table of texts to the loggers that take texts."""
    if not trainer.is_global_zero:
        return
    with spared(f"the table {name}"):
        for logger in trainer.loggers:
            backend: Any = logger
            if isinstance(logger, TensorBoardLogger):
                backend.experiment.add_text(name, _markdown(columns, rows), _step(trainer))
            elif hasattr(backend, "log_text"):
                backend.log_text(key=name, columns=columns, data=rows, step=_step(trainer))


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
