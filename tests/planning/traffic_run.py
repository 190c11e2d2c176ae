"""Two gloo processes train for a step each way, and write what one sent and holds: `python traffic_run.py OUT`."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spl.data.base import PreferenceDataModule
from spl.modules.preference import PreferenceModule
from spl.modules.sharding import ShardedStrategy

# Every way that is tried: settings of ShardedStrategy (None for DDP), LoRA rank (0 for all weights), precision.
WAYS: dict[str, tuple[dict[str, bool] | None, int, str]] = {
    "ddp-lora": (None, 8, "32-true"),
    "ddp-full": (None, 0, "32-true"),
    "fsdp-lora": ({}, 8, "32-true"),
    "fsdp-full": ({}, 0, "32-true"),
    "fsdp-full-mixed": ({}, 0, "bf16-mixed"),
    "fsdp-full-every": ({"reduce_every_micro_batch": True}, 0, "32-true"),
    "fsdp-lora-kept": ({"reshard_after_forward": False}, 8, "32-true"),
    "fsdp-full-kept": ({"reshard_after_forward": False}, 0, "32-true"),
}


class Sent(TorchDispatchMode):
    """Calls and bytes of collectives, as a ring of two sends them; the few numbers of figures and norms left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[float]] = {"all_gather": [0, 0], "reduce_scatter": [0, 0], "all_reduce": [0, 0]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if name.startswith("c10d.") and max((t.numel() for t in tensors), default=0) > 64:
            largest = max(t.nbytes for t in tensors)  # of a shard and the whole, the whole
            kinds = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}
            kind = next(kind for part, kind in kinds.items() if part in name)
            self.seen[kind][0] += 1
            self.seen[kind][1] += largest * (2 if kind == "all_reduce" else 1) / 2
        return func(*args, **(kwargs or {}))


class Witness(Callback):
    """Counts what the batches of an optimiser step send, and what a process then holds."""

    def __init__(self) -> None:
        self.sent = Sent()
        self.held: dict[str, int] = {}

    def on_train_batch_start(self, *args: Any) -> None:
        self.sent.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.sent.__exit__(None, None, None)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        moments = [x for state in trainer.optimizers[0].state.values() for x in state.values() if x.ndim]
        self.held = {"weights": _own_bytes(pl_module.policy.parameters()), "moments": _own_bytes(moments)}


def _own_bytes(tensors: Iterable[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def train(sharding: dict[str, bool] | None, rank: int, precision: str, folder: Path) -> dict[str, Any]:
    witness = Witness()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp" if sharding is None else ShardedStrategy(**sharding),
        precision=precision,  # type: ignore[arg-type]
        max_steps=1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        callbacks=[witness],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(
        PreferenceModule("tiny", alpha=1.0, lora_rank=rank, scorer="forest"),
        PreferenceDataModule("survey", batch_size=2),
    )
    return {"sent": witness.sent.seen, "held": witness.held}


def run(rank: int, out: Path) -> None:
    seen = {name: train(*way, out.parent) for name, way in WAYS.items()}
    if rank == 0:
        out.write_text(json.dumps(seen))


def in_two(run: Callable[[int], None]) -> int:
    """Fork two processes that find each other, and run a function of the rank in both; the worse exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in (0, 1):
        if not (child := os.fork()):
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            status = 1
            try:
                run(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # gloo's threads may abort a process that ends in the ordinary way
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    raise SystemExit(in_two(lambda rank: run(rank, Path(sys.argv[1]))))
