"""An optimiser step's examples shared out among its micro-batches and processes by their tokens.

A step sees the examples it would see anyway; only which of them go through the network together changes. Every step has
the same number of micro-batches, because Lightning's automatic optimisation (clipping, schedules and the synchronising
of processes with it) counts them by that; each weighs by the examples it holds, so their sum is the whole step's mean.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's examples."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order


def partition(sizes: Sequence[int], num_groups: int) -> list[list[int]]:
    """Indices of items in groups of about equal total size, largest group first; none is empty.

    The largest item first, each to the group that is smallest so far (Graham 1969): the largest group is at most 4/3 of
    what the best division has. There must be as many items as groups.
    """
    heap = [(0, group) for group in range(num_groups)]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for item in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        load, group = heapq.heappop(heap)
        groups[group].append(item)
        heapq.heappush(heap, (load + sizes[item], group))
    by_load = [group for _, group in sorted(heap, reverse=True)]
    return [sorted(groups[group]) for group in by_load]


@dataclass(frozen=True)
class Balanced:
    """The batches of a training epoch, `micro_batches` a step and process; a last incomplete step is left out.

    Attributes:
        lengths: [N] tokens of every example.
        step_size: examples of an optimiser step, over all processes.
        micro_batches: of a step, on each process.
    """

    lengths: Any
    step_size: int
    micro_batches: int
    seed: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return len(self.lengths) // self.step_size * self.micro_batches

    def __call__(self, epoch: int) -> list[list[int]]:
        # Processes work at the same time on groups that are neighbours in size.
        return [group for step in self.steps(epoch) for group in self.groups(step)[self.rank :: self.world]]

    def steps(self, epoch: int) -> list[list[int]]:
        """The examples of each optimiser step."""
        order = shuffled(len(self.lengths), self.seed, epoch)
        stop = len(order) // self.step_size * self.step_size
        return [order[start : start + self.step_size] for start in range(0, stop, self.step_size)]

    def groups(self, step: list[int]) -> list[list[int]]:
        """A step's examples as micro-batches of all processes, the largest first."""
        return [[step[k] for k in group] for group in partition([int(self.lengths[k]) for k in step], self.parts)]

    @property
    def parts(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.micro_batches * self.world

    def largest(self, epochs: int) -> list[int]:
        """The micro-batch with the most tokens of the first epochs."""
        first = (self.groups(step)[0] for epoch in range(epochs) for step in self.steps(epoch))
        return max(first, key=lambda group: int(self.lengths[group].sum()))


def fewest(lengths: Any, step_size: int, max_tokens: int, at_least: int, world: int, seed: int, epochs: int) -> int:
    """The smallest number of micro-batches, on each process, with which no step of a run has one above max_tokens.

    No example may be longer than that itself.
    """
    number = at_least
    for epoch in range(epochs):
        for step in Balanced(lengths, step_size, 1, seed).steps(epoch):
            sizes = [int(lengths[k]) for k in step]
            number = max(number, -(-sum(sizes) // (max_tokens * world)))
            while _heaviest(sizes, number * world) > max_tokens:
                number += 1
    return number


def _heaviest(sizes: list[int], num_groups: int) -> int:
    if num_groups >= len(sizes):
        return max(sizes)
    return int(np.sum([sizes[k] for k in partition(sizes, num_groups)[0]]))
