"""The progress bar, with the field's short names."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {
    "train/loss": "loss",
    "train/rewards/margins": "margin",
    "train/rewards/accuracies": "accuracy",
    "train/tokens_per_second": "tokens/s",
}
_LAST = {"val/entropy": "entropy", "val/kl": "kl"}  # of the monitors' last samples, nats a reply


class ProgressBar(RichProgressBar):
    """Shows loss, margin, accuracy and tokens per second, and with monitors entropy and KL; the rest is in the logs."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        shown: dict[str, Any] = {short: metrics[name] for name, short in _SHORT.items() if name in metrics}
        if "tokens/s" in shown:
            shown["tokens/s"] = f"{shown['tokens/s']:,.0f}"
        last = trainer.callback_metrics
        shown |= {short: last[name].item() for name, short in _LAST.items() if name in last}
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        return {"step": f"{trainer.global_step}{total}"} | shown

    def _get_train_description(self, current_epoch: int) -> str:
        """Lightning's own says "Epoch 3/-2" where only the steps are limited."""
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))
