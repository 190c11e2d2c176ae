"""Runs of `spl fit`, one after the other, in one process or in two that are forked and joined by gloo.

`python two_processes.py FOLDER` reads FOLDER/runs.json, {name: {"processes": 1 or 2, "args": [...]}}. Each run goes to
FOLDER/NAME, and what its process R saw to FOLDER/NAME.R.json. The exit status is 1 where a run failed.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from spl.cli import main


def train(folder: Path, name: str, processes: int, args: list[str]) -> None:
    """With the witness, and without what only a person looks at."""
    witness = json.dumps([{"class_path": "witness.Witness", "init_args": {"path": str(folder / f"{name}.json")}}])
    own = ["--trainer.devices", str(processes), f"--trainer.callbacks+={witness}"]
    folder_args = [] if "--output" in args else ["--output", str(folder / name)]
    main(["fit", *args, *folder_args, *own, "--trainer.enable_progress_bar", "false", "--trainer.logger=[]"])


def train_all(folder: Path, processes: int, runs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for name, settings in runs.items():
        if settings["processes"] == processes:
            train(folder, name, processes, settings["args"])


def in_two(folder: Path, runs: dict[str, Any]) -> int:
    """Fork both processes of the runs that take two; the worse of their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in (0, 1):
        if not (child := os.fork()):
            signal.alarm(480)  # processes that wait for each other end then
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = 1
            try:
                train_all(folder, 2, runs)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # gloo's threads may abort a process that ends in the ordinary way
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = json.loads((folder / "runs.json").read_text())
    status = in_two(folder, runs)
    train_all(folder, 1, runs)
    raise SystemExit(status)
