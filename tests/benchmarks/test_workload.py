"""The work that the benchmark counts, against a count of what really runs; and that its programs run."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ours
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from workload import Clock, batches, four_responses

from spl.modules.flops import matrix_sizes, step_flops
from spl.modules.preference import PreferenceModule


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Say {'a lot of ' * k}{k}.", "chosen": f"{k}!", "rejected": "No. " * (k + 1)} for k in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_flops_are_those_of_the_products_that_run(pairs: Path, lora_rank: int) -> None:
    module = PreferenceModule("tiny", lora_rank=lora_rank, scorer="forest")
    module.configure_model()
    (batch,) = batches("tiny", pairs, 1, 6)
    with FlopCounterMode(display=False) as counter:
        module.loss_of(batch).backward()
    operations = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in operations.items() if "attention" not in name and "bmm" not in name)
    # Attention apart: it is counted by the (query, key) pairs seen, not by the rectangles that kernels are given.
    attention = 4.0 * 2 * 64 * float((batch.position_ids + 1).sum()) * 4
    expected = step_flops(matrix_sizes(module.policy), batch) - attention
    if lora_rank:
        # The counter does not know the product that is added in place: x A^T B^T forwards, (g B) A backwards.
        layers = [m for m in module.policy.modules() if hasattr(m, "lora_A")]
        added = sum(m.lora_B["default"].weight.numel() + m.lora_A["default"].weight.numel() for m in layers)
        expected -= 2.0 * batch.num_tokens * added
    # Nothing takes the gradient of the embeddings' output that adapters alone would need: one product of layer 0.
    assert products == pytest.approx(expected, rel=0.06)


def test_the_clock_counts_what_lies_between() -> None:
    clock = Clock()
    time.sleep(0.05)
    before = clock.read()
    sum(range(1_000_000))
    wall, cpu = clock.read()
    assert before[0] >= 0.05 > before[1]
    assert wall > before[0] and cpu > before[1]


def test_four_responses_are_as_long_as_their_prompt() -> None:
    together, pairs = four_responses(263, 16, prompts=2)
    assert together.num_tokens == 2 * (16 + 4 * 15)
    assert (len(pairs), {pair.num_tokens for pair in pairs}) == (12, {16 + 2 * 15})
    assert len(together.comparisons) == sum(len(pair.comparisons) for pair in pairs) == 12


@pytest.mark.parametrize("part", ["train", "cache", "responses4"])
def test_the_program_runs(
    part: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "tiny", "--pairs", str(pairs), "--steps", "2", "--batch-size", "3", "--response-length", "8"]
    options += ["--repeats", "1", *(["--cache", str(tmp_path / "cache")] if part == "cache" else [])]
    monkeypatch.setattr(sys, "argv", ["ours.py", part, *options])
    ours.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    if part == "responses4":
        assert result["responses4_ratio"] > 0 and result["responses4_pair_forests_ratio"] > 0
        return
    assert len(result["seconds"]) == len(result["cpu_seconds"]) == len(result["matmul_share"]) == 2
    assert torch.tensor(result["reference"]).shape == (2, 3, 2)
    assert result["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert bool(list(tmp_path.glob("cache/*/*.safetensors"))) == (part == "cache")
