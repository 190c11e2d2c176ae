"""What the monitors cost: a run through the command line with every monitor's hooks on a clock.

    python tests/benchmarks/monitors.py --data.path pairs.jsonl.gz --trainer.max_steps 200 --output runs/overhead

Arguments are those of `spl fit` after the configs smollm2_hh.yaml and monitor.yaml. Hooks run one after another in the
training process, so their seconds are all that monitors add; a hook that calls another's counts once. CPU seconds stand
beside wall seconds. Scoring the held-out pairs is no part of it: a run without monitors does that too.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import Clock

from spl.callbacks.calibration import CalibrationMonitor
from spl.callbacks.diversity import DiversityMonitor
from spl.callbacks.early_warnings import EarlyWarnings
from spl.callbacks.entropy import EntropyMonitor
from spl.callbacks.rewards import RewardMonitor
from spl.callbacks.sampler import PolicySampler
from spl.callbacks.samples import SampleTable
from spl.callbacks.start import StartReport
from spl.callbacks.throughput import ThroughputMonitor
from spl.cli import main
from spl.modules.base import PolicyModule

ROOT = Path(__file__).parents[2]
MONITORS = (
    PolicySampler,
    EntropyMonitor,
    CalibrationMonitor,
    DiversityMonitor,
    RewardMonitor,
    SampleTable,
    EarlyWarnings,
    ThroughputMonitor,
)
_open: list[str] = []  # the hooks that run now, outermost first
spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # wall and CPU seconds of each, without those inside
calls: dict[str, int] = defaultdict(int)


def timed(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        clock = Clock()
        _open.append(name)
        try:
            return hook(*args, **kwargs)
        finally:
            _open.pop()
            calls[name] += 1
            for k, seconds in enumerate(clock.read()):
                spent[name][k] += seconds
                if _open:
                    spent[_open[-1]][k] -= seconds

    return run


def put_on_a_clock() -> None:
    for cls in MONITORS:
        for hook in [name for name in vars(cls) if name.startswith("on_") or name == "setup"]:
            setattr(cls, hook, timed(cls.__name__, getattr(cls, hook)))
    PolicyModule.on_before_optimizer_step = timed("gradient norm", PolicyModule.on_before_optimizer_step)  # type: ignore[method-assign]


class Run:
    """From the first hook of training to the last."""

    def __init__(self) -> None:
        self.seconds = (0.0, 0.0)

    def watch(self) -> None:
        begin, end = StartReport.on_train_start, PolicySampler.on_train_end

        def start(*args: Any) -> None:
            self.clock = Clock()
            begin(*args)

        def stop(*args: Any) -> None:
            end(*args)
            self.seconds = self.clock.read()

        StartReport.on_train_start, PolicySampler.on_train_end = start, stop  # type: ignore[method-assign]


def report(run: tuple[float, float]) -> None:
    total = [sum(seconds[k] for seconds in spent.values()) for k in (0, 1)]
    print(f"\n{'':20}{'calls':>8}{'wall s':>10}{'CPU s':>10}{'% of the run without':>24}")
    rest = run[1] - total[1]
    for name, (wall, cpu) in sorted(spent.items(), key=lambda item: -item[1][1]):
        print(f"{name:20}{calls[name]:8}{wall:10.1f}{cpu:10.1f}{100 * cpu / rest:23.2f}%")
    print(f"{'all monitors':20}{'':8}{total[0]:10.1f}{total[1]:10.1f}{100 * total[1] / rest:23.2f}%")
    print(f"{'the run':20}{'':8}{run[0]:10.1f}{run[1]:10.1f}   (wall: {100 * total[0] / (run[0] - total[0]):.2f}%)")


if __name__ == "__main__":
    put_on_a_clock()
    whole = Run()
    whole.watch()
    configs = [ROOT / "configs" / name for name in ("experiment/smollm2_hh.yaml", "callbacks/monitor.yaml")]
    main(["fit", *(word for path in configs for word in ("--config", str(path))), *sys.argv[1:]])
    report(whole.seconds)
