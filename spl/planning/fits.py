"""The smallest way to train a model that fits a GPU's memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from spl.modules.memory import Memory, Setup, peak_memory
from spl.modules.shape import Shape
from spl.planning.gpus import GPU
from spl.planning.work import Work
from spl.types import PreferenceBatch

MOST = 1024  # devices


class Fit(NamedTuple):
    """A way that fits."""

    setup: Setup
    max_tokens: int | None  # a budget of tokens, the run's own or a smaller one
    reduces_each: bool  # it only fits where gradients are shared out after every micro-batch of several
    memory: Memory


def smallest_fit(shape: Shape, work: Work, setup: Setup, gpu: GPU) -> Fit | None:
    """The first way that fits, on 1, 2, 4 and so on up to 1,024 devices; None where none does."""
    devices = 1
    while devices <= MOST:
        if fit := fit_on(devices, shape, work, setup, gpu):
            return fit
        devices *= 2
    return None


def fit_on(devices: int, shape: Shape, work: Work, setup: Setup, gpu: GPU) -> Fit | None:
    """The first way that fits so many devices, of those in the order in which they cost; None where none does.

    The whole model on every device before shards of it; for each, activations kept, computed again, and computed again
    with smaller micro-batches; shards whose gradients are added up whole before those that are shared out every time.
    """
    for way, budget, batch in _ways(devices, setup, work):
        for whole in (True, False) if way.sums_whole else (False,):
            memory = peak_memory(shape, batch, replace(way, sums_whole=whole))
            if memory.total <= gpu.memory:
                return Fit(replace(way, sums_whole=whole), budget, way.sums_whole and not whole, memory)
    return None


def _ways(devices: int, setup: Setup, work: Work) -> Iterator[tuple[Setup, int | None, PreferenceBatch]]:
    own, batch = work.largest[0]
    for way in _layouts(devices, setup):
        yield replace(way, checkpointing=False), own, batch
        for budget, smaller in work.largest:
            several = way.layout == "fsdp" and (way.sums_whole or budget != own)
            yield replace(way, checkpointing=True, sums_whole=several), budget, smaller


def _layouts(devices: int, setup: Setup) -> Iterator[Setup]:
    yield replace(
        setup, layout="single" if devices == 1 else "ddp", devices=devices, cpu_offload=False, sums_whole=False
    )
    if devices > 1:
        yield replace(setup, layout="fsdp", devices=devices)
