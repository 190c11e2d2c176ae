"""Replies to a fixed set of prompts, drawn every so often and handed to every monitor that looks at samples."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from spl.sampling.generate import sample
from spl.types import Prompt, ResponseLaws, UserError

log = logging.getLogger(__name__)


class PromptSamples(NamedTuple):
    """N replies to one prompt."""

    prompt: str
    texts: tuple[str, ...]  # without the EOS token
    token_ids: tuple[tuple[int, ...], ...]  # with it, where the reply has ended
    ended: tuple[bool, ...]  # false where the reply was cut at the most tokens


class SampleRound(NamedTuple):
    """What this process drew: the policy's replies at one step, beside the reference's to the same prompts.

    Prompts are shared out among processes, so figures over all of them want a metric that is synchronised.
    """

    step: int
    policy: tuple[PromptSamples, ...]
    reference: tuple[PromptSamples, ...]  # of the policy before step 1, with the same random numbers; empty without one
    laws: ResponseLaws  # along the policy's replies, prompt by prompt, beside the reference's
    reference_laws: ResponseLaws | None  # the reference's own, along its replies


class PolicySampler(Callback):
    """Samples replies at temperature 1 before the first step, every N steps and after the last.

    Every callback of the trainer with a method `on_samples(trainer, pl_module, samples: SampleRound)` is given them;
    with none such nothing is drawn. Callbacks with a method `on_sampling_start(trainer, pl_module)` or
    `on_sampling_end` hear of it before, and when all have looked.
    The random numbers are the same in every round, so that rounds differ by the policy alone. Monitors add a sampler
    with default settings where the trainer has none.

    Args:
        every_n_steps: optimiser steps between rounds.
        num_prompts: prompts, the first of the held-out data (or of the training data).
        num_samples: replies a prompt.
        max_new_tokens: most tokens of a reply; entropies are of replies cut there.
        prompts: user turns to ask in place of the data's prompts.
        max_prompt_tokens: longer prompts of the data are passed over.
        seed: of the replies.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        num_prompts: int = 6,
        num_samples: int = 4,
        max_new_tokens: int = 64,
        prompts: list[str] | None = None,
        max_prompt_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "num_prompts": num_prompts, "num_samples": num_samples}
        for name, value in (counts | {"max_new_tokens": max_new_tokens}).items():
            if value < 1:
                raise UserError(f"samples.{name} must be 1 or more, but is {value}.")
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens
        self.prompts = prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self._last_step = -1
        self._asked: list[tuple[int, Prompt]] | None = None  # the prompts this process draws for, and their numbers
        self._own = slice(None)  # those of them that it reports
        self._reference: tuple[tuple[PromptSamples, ...], ResponseLaws] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._last_step, self._asked, self._reference = -1, None, None

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % self.every_n_steps == 0:  # also where a checkpoint came before its step's round
            self._round(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._round(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._round(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._last_step = -1  # of the run that a checkpoint is from
            self._round(trainer, pl_module)

    def _round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        listeners = [c for c in callbacks if hasattr(c, "on_samples")]
        if not listeners or self._last_step == trainer.global_step:
            return
        if self._asked is None:
            self._asked = self._choose_prompts(trainer)
        if self._asked:
            _tell(callbacks, "on_sampling_start", trainer, pl_module)
            samples = self._draw_finite(trainer, pl_module)
            _tell(listeners, "on_samples", trainer, pl_module, samples)
        self._last_step = trainer.global_step  # not before, for a round may be broken off
        if self._asked:
            _tell(callbacks, "on_sampling_end", trainer, pl_module)

    def _draw_finite(self, trainer: Trainer, pl_module: LightningModule) -> SampleRound:
        try:
            with trainer.precision_plugin.forward_context():
                return self._draw(trainer, pl_module)
        except FloatingPointError as error:
            raise UserError(
                f"{error} at step {trainer.global_step}, so it cannot be sampled; checkpoints saved before are kept. "
                "Lower model.lr, or set trainer.gradient_clip_val."
            ) from error

    def _choose_prompts(self, trainer: Trainer) -> list[tuple[int, Prompt]]:
        """The prompts that this process draws for; empty where there are none."""
        if not getattr(trainer.lightning_module, "writes_replies", True):
            log.warning("No samples are drawn, so what monitors show of them is left out: a reward model writes none.")
            return []
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "prompts"):
            log.warning(
                "No samples are drawn: prompts come from a PreferenceDataModule, which the Trainer was not given."
            )
            return []
        prompts = list(enumerate(data.prompts(self.num_prompts, self.prompts, self.max_prompt_tokens)))
        if len(prompts) < trainer.world_size:
            raise UserError(
                f"{len(prompts)} prompts cannot be shared by {trainer.world_size} processes: raise samples.num_prompts."
            )
        own = slice(trainer.global_rank, None, trainer.world_size)
        # Processes that share a model's weights run it together, so all of them draw everything.
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        self._own = own if together else slice(None)
        return prompts if together else prompts[own]

    def _draw(self, trainer: Trainer, module: Any) -> SampleRound:
        with module.generating():
            policy = self._replies(module, module.policy)
            laws = self._laws(trainer, module, policy)
            if module.has_reference and self._reference is None:
                self._reference = self._draw_reference(trainer, module, policy, laws)
        own, num = self._own, self.num_samples
        reference, reference_laws = self._reference or ((), None)
        kept = None if reference_laws is None else _rows_of(reference_laws, own, num)
        return SampleRound(trainer.global_step, policy[own], reference[own], _rows_of(laws, own, num), kept)

    def _draw_reference(
        self, trainer: Trainer, module: Any, policy: tuple[PromptSamples, ...], laws: ResponseLaws
    ) -> tuple[tuple[PromptSamples, ...], ResponseLaws]:
        if module.untrained:
            return policy, laws  # the policy is the reference, and the random numbers are the same
        with module.as_reference() as reference:
            replies = self._replies(module, reference)
        return replies, self._laws(trainer, module, replies, of_reference=True)

    def _replies(self, module: Any, model: torch.nn.Module) -> tuple[PromptSamples, ...]:
        assert self._asked is not None
        ends = module.eos_token_ids
        numbers, prompts = zip(*self._asked, strict=True)
        drawn = sample(
            model,
            [prompt.input_ids for prompt in prompts],
            self.num_samples,
            eos_token_ids=ends,
            max_new_tokens=self.max_new_tokens,
            seeds=[self.seed * 10_007 + number for number in numbers],
        )
        return tuple(_as_samples(p.text, r, ends, module.tokenizer) for p, r in zip(prompts, drawn, strict=True))

    def _laws(
        self, trainer: Any, module: Any, samples: Sequence[PromptSamples], of_reference: bool = False
    ) -> ResponseLaws:
        assert self._asked is not None
        prompts = [prompt for _, prompt in self._asked]
        batch = trainer.datamodule.sample_batch(prompts, [list(s.token_ids) for s in samples])
        laws: ResponseLaws = module.laws(module.transfer_batch_to_device(batch, module.device, 0), of_reference)
        return laws


def _tell(callbacks: list[Any], hook: str, *args: Any) -> None:
    for callback in callbacks:
        if hasattr(callback, hook):
            getattr(callback, hook)(*args)


def _rows_of(laws: ResponseLaws, prompts: slice, num_samples: int) -> ResponseLaws:
    """The laws of some prompts' replies."""
    return ResponseLaws._make(column.view(-1, num_samples)[prompts].flatten() for column in laws)


def _as_samples(prompt: str, replies: list[tuple[int, ...]], ends: set[int], tokenizer: Any) -> PromptSamples:
    ended = tuple(reply[-1] in ends for reply in replies)
    texts = tuple(
        str(tokenizer.decode(reply[:-1] if end else reply)) for reply, end in zip(replies, ended, strict=True)
    )
    return PromptSamples(prompt, texts, tuple(replies), ended)


def ensure_sampler(trainer: Trainer) -> None:
    """Give a trainer whose callbacks look at samples the sampler that draws them, with default settings."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, PolicySampler) for callback in callbacks):
        callbacks.append(PolicySampler())
