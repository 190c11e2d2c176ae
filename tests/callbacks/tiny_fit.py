"""A run of seconds for tests of callbacks."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule


def fit(
    folder: Path, *callbacks: Callback, steps: int = 3, batch_size: int = 8, warmup: float = 0.05, **options: Any
) -> Trainer:
    """Train a random model on the survey's eight questions; without a logger and checkpoints unless options say so."""
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, callbacks=list(callbacks),
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0,
        log_every_n_steps=1, **{"logger": False, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    module = PreferenceModule("tiny", alpha=1.0, beta=0.1, lora_rank=4, warmup=warmup)
    trainer.fit(module, PreferenceDataModule("survey", val_path="survey", batch_size=batch_size))
    return trainer
