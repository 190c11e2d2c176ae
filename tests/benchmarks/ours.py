"""This project's side of the benchmark, one JSON line: our module in a Lightning Trainer on batches in file order."""

import argparse
import json
import logging
import resource
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback
from torch.utils.data import DataLoader
from workload import Clock, batches, four_responses, matmul_rate

from spl.callbacks.reference_cache import ReferenceCache
from spl.modules.flops import matrix_sizes, step_flops
from spl.modules.preference import PreferenceModule
from spl.types import PreferenceBatch


class Steps(Callback):
    """Seconds, work and figures of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        self.before = matmul_rate(pl_module.device, next(pl_module.policy.parameters()).dtype)
        self.clock = Clock()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        wall, cpu = self.clock.read()
        rate = (self.before + matmul_rate(pl_module.device, next(pl_module.policy.parameters()).dtype)) / 2
        policy, reference = outputs["policy_logps"].reshape(-1, 2), outputs["reference_logps"].reshape(-1, 2)
        self.rows.append(
            {
                "seconds": wall,
                "cpu_seconds": cpu,
                "matmul_share": step_flops(matrix_sizes(pl_module.policy), batch) / wall / rate,
                "loss": outputs["objective"].item(),
                "logps_chosen": policy[:, 0].mean().item(),
                "logps_rejected": policy[:, 1].mean().item(),
                "reference": reference.tolist(),
                "num_tokens": batch.num_tokens,
            }
        )


def module(args: argparse.Namespace, **options: Any) -> PreferenceModule:
    return PreferenceModule(
        args.model,
        beta=0.1,
        dtype=args.dtype,
        lora_rank=0 if args.full else 16,
        gradient_checkpointing=args.checkpointing,
        attention=args.attention,
        schedule="constant",
        warmup=0,
        **options,
    )


def train(args: argparse.Namespace, work: list[PreferenceBatch], cache: Path | None = None) -> list[dict[str, Any]]:
    steps = Steps()
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,  # as TRL
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[steps] if cache is None else [steps, ReferenceCache(str(cache))],
    )
    # The batches are made beforehand, and kept as they are.
    trainer.fit(module(args), DataLoader(work, batch_size=None, collate_fn=_itself))  # type: ignore[arg-type]
    return steps.rows


def _itself(batch: PreferenceBatch) -> PreferenceBatch:
    return batch


def responses4(args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds (wall on a GPU) of six comparisons: as plain padded pairs, as pair forests, as one forest."""
    ours = module(args, scorer="forest")
    ours.configure_model()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours.to(device)
    together, pairs = four_responses(ours.policy.config.vocab_size, args.response_length)
    everything = _move(together, device), [_move(pair, device) for pair in pairs]
    took: dict[str, list[float]] = {"plain": [], "pairs": [], "one": []}
    for _ in range(args.repeats + 1):
        for name, work, scorer in (
            ("one", [everything[0]], "forest"), ("pairs", everything[1], "forest"), ("plain", everything[1], "plain")
        ):  # fmt: skip
            ours.scorer = scorer  # type: ignore[assignment]
            clock = Clock()
            for batch in work:
                ours.loss_of(batch).backward()
            wall, cpu = clock.read()
            ours.zero_grad()
            took[name].append(wall if device.type == "cuda" else cpu)
    plain, couples, one = (took[name][1:] for name in ("plain", "pairs", "one"))  # the first warms up
    return {
        "responses4_ratio": statistics.median(p / o for p, o in zip(plain, one, strict=True)),
        "responses4_pair_forests_ratio": statistics.median(p / o for p, o in zip(couples, one, strict=True)),
    }


def _move(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    return PreferenceBatch(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["train", "cache", "responses4"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flex", "varlen"], default="auto")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    result: dict[str, Any] = {"program": f"spl {args.part}"}
    if args.part == "responses4":
        result |= responses4(args)
    else:
        work = batches(args.model, args.pairs, args.steps, args.batch_size, args.max_length)
        rows = train(args, work, args.cache)
        result |= {name: [row[name] for row in rows] for name in rows[0]}
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result | {"peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main()
