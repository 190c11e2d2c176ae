"""TRL's side of the benchmark: runs the peer's script as it stands, and adds what it does not print.

Its own environment has torch, transformers, peft, datasets and trl, and nothing of this project:

    PYTHON_OF_TRL peer.py PATH/trl_dpo.py --model ... --pairs ... [the peer's other options]

Prints the peer's JSON line and then one more: CPU seconds of every step, and with --precompute the reference's summed
log-probabilities of every pair, for which two steps of training are enough and are all that is done.
"""

import json
import runpy
import sys
import time
from typing import Any

import trl
from transformers import TrainerCallback


class _CpuSeconds(TrainerCallback):
    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


class _Kept(trl.DPOTrainer):
    """TRL's trainer, at hand when its script is done."""

    made: "list[_Kept]" = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cpu_seconds: list[float] = []
        self.made.append(self)
        self.add_callback(_CpuSeconds(self.cpu_seconds))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.precompute_ref_logps:
            self.args.max_steps = 2
        return super().train(*args, **kwargs)


def main() -> None:
    trl.DPOTrainer = _Kept  # type: ignore[misc]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    trainer = _Kept.made[-1]
    rows = trainer.train_dataset
    found = [list(pair) for pair in zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True)] \
        if "ref_chosen_logps" in rows.column_names else None  # fmt: skip
    print(json.dumps({"cpu_seconds": trainer.cpu_seconds, "reference": found}))


if __name__ == "__main__":
    main()
