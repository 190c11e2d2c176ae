"""Samples of a program that is killed at random, again and again, are those of one that was not."""

import json
import signal
import time
from pathlib import Path

import pytest
from fault_runs import Lab, over, said, wait_for

MODES = {"token by token": [], "whole replies": ["--global_temperature", "1.3", "--num_particles", "8"]}


@pytest.mark.parametrize("mode", MODES)
def test_killed_and_gone_on_with(lab: Lab, tmp_path: Path, mode: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {k}."}) + "\n" for k in range(6)))

    def start(output: Path) -> int:
        options = ["--num_samples", "4", "--max_new_tokens", "24", "--batch_size", "4", *MODES[mode]]
        command = ["sample", "tiny", "--prompts", str(prompts), "--output", str(output), *options]
        return lab.start_command(command, log=output.with_suffix(".log"))

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert lab.wait(start(whole)) == 0, said(whole)
    for number in range(1, 4):
        process = start(killed)
        most = whole.stat().st_size * lab.rng.uniform(number - 1, number) / 4
        wait_for(lambda process=process, most=most: size(killed) > most or over(process), 300)
        time.sleep(lab.rng.uniform(0, 0.02))
        if not over(process):
            lab.kill(process, signal.SIGKILL)
        assert lab.wait(process) in (0, -signal.SIGKILL), said(killed)
    assert lab.wait(start(killed)) == 0, said(killed)
    # But for the time at which they were begun.
    assert killed.read_bytes().splitlines()[1:] == whole.read_bytes().splitlines()[1:]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
