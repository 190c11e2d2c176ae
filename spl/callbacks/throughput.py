"""How fast training goes, how much of the device that is, and how much memory it takes."""

import resource
import statistics
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from spl.types import PreferenceBatch


class Mark(NamedTuple):
    """The clock, and what has been done by then."""

    seconds: float
    tokens: int = 0
    padded_tokens: int = 0
    flops: float = 0.0


class ThroughputMonitor(Callback):
    """Logs the rate of training over the last `window` batches, a process; pauses are no training time.

    `train/tokens_per_second`: distinct tokens through the network.
    `train/padded_tokens_per_second`: what a trainer that pads would have had to process in the same time.
    `train/peak_share`: operations that the model asks for (`step_flops` of the module), as a share of what the device
    could do in that time: its data sheet on a GPU that Lightning knows, else a matrix product timed before step 1.
    `train/memory_gib`: most memory held so far on a CUDA device, else what the process holds now.

    The clock is read without waiting for the device, so a rate is right over a window, not over one step.

    Args:
        window: batches that a rate is taken over.
    """

    def __init__(self, window: int = 20) -> None:
        self.marks: deque[Mark] = deque(maxlen=window + 1)
        self.peak: float | None = None  # operations a second
        self.flops = 0.0  # of the batch under way

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks.clear()
        if hasattr(pl_module, "step_flops"):
            self.peak = peak_flops(pl_module.device, _compute_dtype(trainer, pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        if self.peak:
            module: Any = pl_module
            self.flops = module.step_flops(batch)  # before the step, which may keep the reference's numbers
        if not self.marks:
            self.marks.append(Mark(time.perf_counter()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        if not self.marks:  # a callback before this one has made a pause since the step
            return
        last, first = self.marks[-1], self.marks[0]
        now = Mark(
            time.perf_counter(),
            last.tokens + outputs["num_tokens"],
            last.padded_tokens + padded_tokens(batch),
            last.flops + self.flops,
        )
        self.marks.append(now)
        seconds = max(now.seconds - first.seconds, 1e-9)
        rates = {
            "tokens_per_second": (now.tokens - first.tokens) / seconds,
            "padded_tokens_per_second": (now.padded_tokens - first.padded_tokens) / seconds,
            "memory_gib": _memory(pl_module.device) / 2**30,
        }
        if self.peak:
            rates["peak_share"] = (now.flops - first.flops) / seconds / self.peak
        for name, value in rates.items():
            pl_module.log(f"train/{name}", value, prog_bar=name == "tokens_per_second", batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks.clear()

    def on_sampling_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks.clear()


def padded_tokens(batch: PreferenceBatch) -> int:
    """Tokens of the batch where every response stands with its prompt and is padded to the longest of them.

    Read from the tree, which is plain data: nothing waits for the device. The row lacks a response's last token.
    """
    depths: list[int] = []  # of the tokens that follow each node
    for node in batch.nodes:
        depths.append((depths[node.parent] if node.parent >= 0 else 0) + node.end - node.start)
    return batch.num_responses * (max(depths) + 1)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a device can do: by its data sheet where Lightning has it, or as timed.

    Timed is the median of matrix products, some tens of milliseconds of them; no random state moves.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a device is not in its table
        known = get_available_flops(device, dtype) if device.type == "cuda" else None
    return float(known) if known else _timed_flops(device, dtype)


def _timed_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 768 if device.type == "cpu" else 4096
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=draw).to(device, dtype)
    seconds: list[float] = []
    torch.mm(matrix, matrix)  # the first one also loads the kernel
    while len(seconds) < 3 or sum(seconds) < 0.05:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds)


def _compute_dtype(trainer: Trainer, pl_module: LightningModule) -> torch.dtype:
    """What the products are taken in."""
    return torch.bfloat16 if trainer.precision == "bf16-mixed" else next(pl_module.parameters()).dtype


def _memory(device: torch.device) -> float:
    """Bytes: most held so far of a CUDA device, else those of this process, now or (where /proc is lacking) at most."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    statm = Path("/proc/self/statm")
    if statm.exists():
        return float(int(statm.read_text().split()[1]) * resource.getpagesize())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
