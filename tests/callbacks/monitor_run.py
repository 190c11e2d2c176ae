"""A monitored run of the tiny model; as a script, one under DDP.

`python monitor_run.py FOLDER` trains with two processes; process 0 leaves metrics.csv, pictures and samples in FOLDER,
and each process R what it knew at the end in FOLDER/figures-R.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.diversity import DiversityMonitor
from spl.callbacks.early_warnings import EarlyWarnings
from spl.callbacks.entropy import EntropyMonitor
from spl.callbacks.rewards import RewardMonitor
from spl.callbacks.run_folder import MetricsLogger
from spl.callbacks.sampler import PolicySampler
from spl.callbacks.samples import SampleTable
from spl.callbacks.start import StartEndValidation
from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule


def monitors(**options: Any) -> list[Callback]:
    return [
        StartEndValidation(),
        EntropyMonitor(),
        CalibrationMonitor(),
        DiversityMonitor(match_length=8),
        RewardMonitor(),
        SampleTable(num_shown=0),
        EarlyWarnings(),
        PolicySampler(**({"num_prompts": 5, "num_samples": 3, "max_new_tokens": 12, "every_n_steps": 2} | options)),
    ]


def module(**options: Any) -> PreferenceModule:
    torch.manual_seed(0)
    return PreferenceModule("tiny", **({"alpha": 0.5, "beta": 0.1, "lr": 5e-3, "lora_rank": 4} | options))


def trainer(folder: Path, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=list(callbacks) or monitors(),
        logger=MetricsLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"inference_mode": False, **options},
    )


def run(folder: Path, batch_size: int = 8, **options: Any) -> Trainer:
    """Four steps, each over the whole survey."""
    fitted = trainer(folder, **options)
    data = PreferenceDataModule("survey", val_path="survey", turn_end="eos", batch_size=batch_size)
    fitted.fit(module(), data)
    return fitted


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    done = run(output, batch_size=4, devices=2, strategy="ddp")
    figures = {name: value.item() for name, value in done.callback_metrics.items()}
    (output / f"figures-{done.global_rank}.json").write_text(json.dumps(figures))
