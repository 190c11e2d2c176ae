"""What two gloo processes send under DDP and FSDP2, against the formula."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from held import random_pairs
from traffic_run import WAYS

from spl.modules.memory import Setup, peak_memory
from spl.modules.preference import PreferenceModule
from spl.modules.shape import Shape, shape_of
from spl.planning.traffic import collectives

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("traffic") / "seen.json"
    command = [sys.executable, "-W", "ignore", str(HERE / "traffic_run.py"), str(out)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def shape(rank: int) -> Shape:
    module = PreferenceModule("tiny", lora_rank=rank)
    module.configure_model()
    return shape_of(module.policy)


def setup_of(name: str) -> tuple[Setup, int]:
    """And the LoRA rank."""
    sharding, rank, precision = WAYS[name]
    given = sharding or {}
    setup = Setup(
        "ddp" if sharding is None else "fsdp",
        devices=2,
        mixed=precision == "bf16-mixed",
        reference_copy=rank == 0,
        reshards=given.get("reshard_after_forward", True),
        sums_whole=not given.get("reduce_every_micro_batch", False),
        cuda=False,
    )
    return setup, rank


@pytest.mark.parametrize("name", WAYS)
def test_processes_send_what_the_formula_says(name: str, seen: dict[str, Any]) -> None:
    setup, rank = setup_of(name)
    sent_by = seen[name]["sent"]
    expected = dict.fromkeys(sent_by, (0.0, 0.0))
    for call in collectives(shape(rank), setup, micro_batches=2, reference=True):
        calls, sent = expected[call.kind]
        expected[call.kind] = (calls + call.calls, sent + call.sent(2))
    for kind, (calls, sent) in expected.items():
        assert sent_by[kind][0] == calls, kind
        assert sent_by[kind][1] == pytest.approx(sent, rel=2e-3), kind  # the vocabulary of 263 is padded to 264


@pytest.mark.parametrize("name", WAYS)
def test_processes_hold_what_the_formula_says(name: str, seen: dict[str, Any]) -> None:
    setup, rank = setup_of(name)
    memory = peak_memory(shape(rank), random_pairs(256, 8, 8, 2), setup)
    assert seen[name]["held"]["weights"] == pytest.approx(memory.weights, rel=2e-3)
    assert seen[name]["held"]["moments"] == pytest.approx(memory.moments, rel=2e-3)
