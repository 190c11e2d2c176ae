"""What was trained as a Hugging Face folder."""

import logging
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from spl.callbacks.checkpoints import UnsavedRunError
from spl.types import UserError

log = logging.getLogger(__name__)


class Export(Callback):
    """Writes `export/` when training has ended, loads it again, and compares it with the trained model.

    A policy's logits are compared, a reward model's rewards.

    Args:
        format: "merged" loads with AutoModelForCausalLM (a reward model with AutoModelForSequenceClassification),
            "adapter" with PeftModel on the same base; "none" skips.
    """

    def __init__(self, format: Literal["merged", "adapter", "none"] = "merged") -> None:
        self.format = format

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.format == "adapter" and not getattr(pl_module, "trains_adapters", True):
            raise UserError(
                "export.format is adapter, but all weights are trained (model.lora_rank 0): set it to merged."
            )
        if stage == "fit" and self.format == "adapter" and not getattr(pl_module, "writes_replies", True):
            raise UserError("export.format is adapter, but a reward model is written whole: set it to merged.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if self.format == "none":
            return
        folder = Path(trainer.default_root_dir) / "export"
        try:
            gap = module.export(folder, self.format)  # in all processes: they may have to run the model together
        except (OSError, SafetensorError) as error:
            raise UnsavedRunError(
                f"training is done and its checkpoint saved, but {folder} could not be written ({error}): mend that, "
                "and run the same command with --resume."
            ) from error
        if gap is not None:
            log.info(
                "Exported %s (%s); loaded again, what it gives is within %.2g of the trained model.",
                folder,
                self.format,
                gap,
            )
