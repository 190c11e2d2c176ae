"""What monitors of held-out comparisons share: where their sums live, and the run's first validation."""

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torchmetrics import Metric

log = logging.getLogger(__name__)


def metric_device(device: torch.device) -> torch.device:
    """Where a metric's sums live: on the run's device, but for Apple's, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def finite(outputs: Any) -> bool:
    """Whether a batch's figures are numbers. The module counts the batches where they are not, and names their rows."""
    return bool(outputs["objective"].isfinite())


class HeldOutMonitor(Callback):
    """Keeps the first validation of a run, which its pictures show beside the present one; says when there is none.

    Args:
        metrics: that the monitor fills.
    """

    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics
        self.first_step = 0
        self.first: Any = None  # what is drawn of the first validation, in primitives

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # what a checkpoint knows is loaded after this
            self.first_step, self.first = 0, None
        for metric in self.metrics:
            metric.to(metric_device(trainer.strategy.root_device))  # the module itself is moved only after this hook

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero and hasattr(data, "val_dataloader") and data.val_dataloader() == []:
            log.warning(
                "%s has no held-out comparisons to look at: set data.val_path or data.val_size.", type(self).__name__
            )

    def keep_first(self, trainer: Trainer, drawn: Any) -> None:
        """Keep what is drawn of a validation, if it is the run's first."""
        if trainer.state.fn == "fit" and not self.first:
            self.first_step, self.first = trainer.global_step, drawn

    def state_dict(self) -> dict[str, Any]:
        return {"first_step": self.first_step, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_step, self.first = state_dict["first_step"], state_dict["first"]
