"""The trained policy as a Hugging Face folder."""

import logging
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class Export(Callback):
    """Writes `export/` when training has ended, loads it again, and compares its logits with the trained model's.

    Args:
        format: "merged" loads with AutoModelForCausalLM, "adapter" with PeftModel on the same base; "none" skips.
    """

    def __init__(self, format: Literal["merged", "adapter", "none"] = "merged") -> None:
        self.format = format

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if self.format == "none":
            return
        folder = Path(trainer.default_root_dir) / "export"
        gap = module.export(folder, self.format)  # in all processes: they may have to run the model together
        if gap is not None:
            log.info(
                "Exported %s (%s); loaded again, its logits are within %.2g of the trained model's.",
                folder,
                self.format,
                gap,
            )
