"""The planner's memory of a sharded step beside what one of two gloo processes holds.

    python tests/benchmarks/plan_sharded.py

A random Llama of 6.8M parameters in 8 layers trains under ShardedStrategy on the embedded survey; the fourth batch is
measured, the last of the second step, when AdamW's moments and the gradient of the batch before are there. FSDP2 makes
and empties its gathered weights past any operation, so its two functions for that are watched as well (torch 2.13).
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from lightning import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

from held import Live
from traffic_run import in_two

from spl.data.base import PreferenceDataModule
from spl.models import load_tokenizer
from spl.modules.preference import PreferenceModule
from spl.modules.sharding import ShardedStrategy

# LoRA rank (0 for all weights), precision, dtype, checkpointing, gradients reduced at every micro-batch.
WAYS = [
    (8, "32-true", "float32", False, False),
    (8, "32-true", "float32", True, False),
    (0, "32-true", "float32", False, False),
    (0, "32-true", "float32", True, False),
    (0, "32-true", "float32", True, True),
    (0, "bf16-mixed", "float32", True, True),
    (0, "32-true", "bfloat16", True, True),
    (0, "32-true", "bfloat16", True, False),
]


class Gathers(Live):
    """Counts gathered weights too, and of sharded tensors this process's own part."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: set[int] = set()  # storages that are counted as they are filled and emptied
        self.plain = (fsdp_param.alloc_storage, fsdp_param.free_storage)

    def __enter__(self) -> Any:
        fsdp_param.alloc_storage = self._fill
        fsdp_param.free_storage = self._empty
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        fsdp_param.alloc_storage, fsdp_param.free_storage = self.plain

    def add(self, tensor: Tensor) -> None:
        own = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if own.untyped_storage()._cdata not in self.gathered:
            super().add(own)

    def _fill(self, tensor: Tensor) -> None:
        before = tensor.untyped_storage().size()
        self.plain[0](tensor)
        self.gathered.add(tensor.untyped_storage()._cdata)
        self.grow(tensor.untyped_storage().size() - before)

    def _empty(self, tensor: Tensor) -> None:
        self.grow(-tensor.untyped_storage().size())
        self.plain[1](tensor)


def lasting(trainer: Trainer, module: Any) -> Iterator[Tensor]:
    """Weights, gradients (whole ones within FSDP2 too), moments, and the reference."""
    models = [module.policy, *([module.reference.model] if module.reference.model is not None else [])]
    for parameter in (p for model in models for p in model.parameters()):
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for group in (m._get_fsdp_state()._fsdp_param_group for m in module.policy.modules() if hasattr(m, "unshard")):
        for one in group.fsdp_params if group else ():
            whole = one.unsharded_accumulated_grad
            if whole is None and hasattr(one, "_unsharded_param"):
                whole = one._unsharded_param.grad
            if whole is not None:
                yield whole
    for state in trainer.optimizers[0].state.values():
        yield from (x for x in state.values() if x.ndim)


class Witness(Callback):
    """Measures the fourth batch."""

    def __init__(self) -> None:
        self.batches = 0
        self.live = Gathers()
        self.said = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if self.batches == 4:
            self.said = pl_module.peak_memory(batch).total
            for tensor in lasting(trainer, pl_module):
                self.live.add(tensor)
            self.live.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.batches == 4:
            self.live.__exit__(None, None, None)


def run(rank: int, model: str) -> None:
    for lora_rank, precision, dtype, checkpointing, every in WAYS:
        witness = Witness()
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ShardedStrategy(reduce_every_micro_batch=every),
            precision=precision,  # type: ignore[arg-type]
            max_steps=2,
            accumulate_grad_batches=2,
            limit_val_batches=0,
            callbacks=[witness],
            default_root_dir=model,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        options: dict[str, Any] = {"dtype": dtype, "gradient_checkpointing": checkpointing}
        module = PreferenceModule(model, alpha=1.0, lora_rank=lora_rank, scorer="forest", **options)
        trainer.fit(module, PreferenceDataModule("survey", batch_size=2))
        if rank == 0:
            kind = "bf16-mixed" if precision == "bf16-mixed" else dtype
            how = "recomputed" if checkpointing else "kept"
            held, said = (f"{number / 2**20:.1f}" for number in (witness.live.peak, witness.said))
            ratio = witness.said / witness.live.peak
            print(f"| {lora_rank} | {kind} | {how} | {'each' if every else 'once'} | {held} | {said} | {ratio:.3f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=2000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer("tiny").save_pretrained(folder)
        print("| LoRA rank | kind | activations | reduced | held MiB | said | said / held |")
        print("|---|---|---|---|---|---|---|", flush=True)
        raise SystemExit(in_two(lambda rank: run(rank, folder)))
