"""What is trained on, as a Trainer takes it: steps of examples that are kept on disk."""

import hashlib
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
from lightning import Trainer

from spl.data.budget import Balanced, fewest
from spl.data.collate import collate
from spl.data.kept import EncodedData
from spl.data.loader import BatchLoader, Shuffled
from spl.data.source import Source
from spl.types import PreferenceBatch, UserError


class TrainingSteps:
    """Examples in optimiser steps, and the settings of the trainer that count a step's micro-batches.

    Args:
        source: where the examples are from.
        examples: all that are trained on.
        settings: the data module's hyper-parameters.
        trainer: takes the steps.
    """

    def __init__(self, source: Source, examples: EncodedData, settings: Mapping[str, Any], trainer: Trainer) -> None:
        self.source = source
        self.examples = examples
        self.settings = settings
        self.trainer = trainer
        self._given: dict[str, Any] = {}  # the trainer's settings as the user gave them, while they are raised

    def plan(self) -> Shuffled | Balanced:
        """The batches of an epoch."""
        hp, rank, world = self.settings, self.trainer.global_rank, self.trainer.world_size
        if not (hp["max_tokens"] or hp["group_by_length"]):
            return Shuffled(len(self.examples), hp["batch_size"], hp["seed"], rank, world)
        accumulated = self.trainer.accumulate_grad_batches
        step_size = hp["batch_size"] * self._given.get("accumulate_grad_batches", accumulated) * world
        return Balanced(self.examples.num_tokens, step_size, accumulated, hp["seed"], rank, world)

    def loader(self) -> BatchLoader:
        return BatchLoader(self.examples, self.plan(), partial(_position, self.trainer), self.settings["num_workers"])

    def prepare(self) -> None:
        """Set the trainer to as many micro-batches a step as max_tokens takes.

        Raises:
            UserError: the examples fill no step, or one of them alone has more than max_tokens.
        """
        plan = self.plan()
        if not len(plan):
            needed = plan.step_size if isinstance(plan, Balanced) else plan.batch_size * plan.world
            raise UserError(
                f"{self.source.path} has {len(self.examples)} examples to train on, fewer than the {needed} that go "
                "into one step: lower data.batch_size."
            )
        if self.settings["max_tokens"] and not self._given:
            self._keep_to_budget(self.settings["max_tokens"])

    def _keep_to_budget(self, budget: int) -> None:
        """Raise the number of micro-batches a step until none exceeds the budget."""
        hp, lengths, trainer = self.settings, self.examples.num_tokens, self.trainer
        longest = int(lengths.argmax())
        if lengths[longest] > budget:
            raise UserError(
                f"data.max_tokens is {budget}, but {self.examples[longest].row} alone has {lengths[longest]} distinct "
                "tokens: raise it, or lower data.max_length."
            )
        before, world = trainer.accumulate_grad_batches, trainer.world_size
        number = fewest(lengths, hp["batch_size"] * before * world, budget, before, world, hp["seed"], self._epochs())
        for name in ("accumulate_grad_batches", "limit_train_batches", "val_check_interval"):
            value = self._given[name] = getattr(trainer, name)
            if type(value) is int:  # batches; a float is a share
                setattr(trainer, name, -(-value * number // before))

    def _epochs(self) -> int:
        """Epochs that the run will see."""
        trainer, plan = self.trainer, self.plan()
        limit = trainer.limit_train_batches
        batches = min(len(plan), limit) if type(limit) is int else int(len(plan) * limit)
        steps_an_epoch = max(batches // trainer.accumulate_grad_batches, 1)
        bounds = [trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
        bounds += [-(-trainer.max_steps // steps_an_epoch)] if trainer.max_steps > 0 else []
        few = max(2_000_000 // len(self.examples), 1)  # of large data the later epochs are taken to be alike
        return min([*bounds, few]) if bounds else 1

    def finish(self) -> None:
        """Give the trainer back the settings that `prepare` raised."""
        for name, value in self._given.items():
            setattr(self.trainer, name, value)
        self._given = {}

    def progress_unit(self) -> dict[str, Any]:
        """What steps and epochs are made of, on which the count of batches that are done rests."""
        number, plan = self.trainer.accumulate_grad_batches, self.plan()
        if isinstance(plan, Balanced):
            step_size, epoch_size = plan.step_size, len(plan) // number * plan.step_size
        else:
            step_size, epoch_size = (plan.batch_size * plan.world * count for count in (number, len(plan)))
        return {
            "step_size": step_size,
            "micro_batches": number,
            "epoch_size": epoch_size,
            "content": self._content,
        }

    @cached_property
    def _content(self) -> str:
        return hashlib.sha256(self.source.identity().encode()).hexdigest()

    def first_batch(self) -> PreferenceBatch:
        return collate([self.examples[k] for k in self.plan()(0)[0]])

    def longest_batch(self) -> PreferenceBatch:
        """The run's largest micro-batch where plans go by length, or else the longest examples together."""
        if isinstance(plan := self.plan(), Balanced):
            return collate([self.examples[k] for k in plan.largest(self._epochs())])
        longest = np.argsort(self.examples.num_tokens, kind="stable")[-self.settings["batch_size"] :]
        return collate([self.examples[int(k)] for k in longest])

    def describe(self) -> str:
        """Where the examples are from, how many they are, and the size of steps."""
        counts = self.examples.report.describe()
        own_alpha = sum(alpha is not None for alpha in self.examples.table["alpha"][:])
        if own_alpha:
            counts += f"; {own_alpha:,} carry an alpha of their own, which goes before model.alpha"
        return f"{self.source.path}: {counts}; {len(self.examples):,} train, {self._sizes()}"

    def _sizes(self) -> str:
        plan, hp = self.plan(), self.settings
        if not isinstance(plan, Balanced):
            return f"batches of {hp['batch_size']}"
        most = f" of at most {hp['max_tokens']:,} distinct tokens" if hp["max_tokens"] else ""
        return f"steps of {plan.step_size} in {plan.parts} micro-batches{most}"

    def describe_lengths(self) -> str:
        lengths = self.examples.num_tokens
        marks = ", ".join(f"{q}% {int(np.quantile(lengths, q / 100)):,}" for q in (50, 90, 99))
        return f"an example at most: {marks}, longest {int(lengths.max()):,}"


def convert_progress(checkpoint: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Count the batches of a checkpoint's run in those of this run, where their steps hold as many examples.

    Args:
        checkpoint: changed in place.
        before: the progress unit of its run.
        now: of this run.

    Raises:
        UserError: they hold others, so that some would be seen twice and some never.
    """
    for name, what in (("step_size", "a step"), ("epoch_size", "an epoch")):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{what} of the run had {before.get(name)} examples and now has {now.get(name)}, so it cannot go on "
                "exactly: keep data.batch_size times devices times trainer.accumulate_grad_batches what it was."
            )
    if before["micro_batches"] == now["micro_batches"]:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        ready = progress[part]["ready"]
        more = -(-ready // before["micro_batches"]) * now["micro_batches"] - ready
        progress[part] = {name: count + more for name, count in progress[part].items()}


def _position(trainer: Trainer) -> tuple[int, int]:
    """The epoch, and the batches of it that are done."""
    loop = trainer.fit_loop
    epoch, progress = trainer.current_epoch, loop.epoch_loop.batch_progress
    if loop.restarting and progress.is_last_batch:
        return epoch + 1, 0  # saved at the end of an epoch, which Lightning closes after this is asked
    return epoch, progress.current.ready
