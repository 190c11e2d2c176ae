"""Two processes load a model in slices: how much memory that takes, and what they then hold.

`python loading_run.py MODEL OUT` forks them; process R writes OUT.R.json.
"""

import json
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer

from spl.models import fingerprint
from spl.modules.preference import PreferenceModule
from spl.modules.sharding import ShardedStrategy


def peak() -> float:
    """Most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def load(name: str, out: Path) -> None:
    torch.set_num_threads(1)
    strategy = ShardedStrategy()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    module = PreferenceModule(name, lora_rank=4, alpha=1.0, beta=0.0)
    module.trainer = trainer
    strategy.connect(module)
    trainer.strategy.setup_environment()
    before = peak()
    torch.manual_seed(5)
    module.configure_model()
    grown = peak() - before
    adapters: dict[str, Any] = {
        name: parameter.full_tensor().flatten()[:8].tolist()  # type: ignore[attr-defined]
        for name, parameter in module.policy.named_parameters()
        if "lora_A" in name
    }
    found = {"grown": grown, "fingerprint": fingerprint(module.policy), "adapters": adapters}
    out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in (0, 1):
        if not (child := os.fork()):
            signal.alarm(240)  # processes that wait for each other end then
            os.environ["LOCAL_RANK"] = str(rank)
            try:
                load(sys.argv[1], Path(sys.argv[2]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
