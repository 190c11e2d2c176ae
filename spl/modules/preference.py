"""Preference training: the policy, the frozen reference, the SPL loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spl.logprobs.cache import LogpCache
from spl.logprobs.score import prepare
from spl.models import fingerprint
from spl.modules.base import PolicyModule, StartCheck
from spl.modules.figures import MEANS, Figures, HeldOutMeans, preference_figures
from spl.modules.reference import Reference
from spl.modules.sharding import is_sharded
from spl.objective.divergences import Divergence
from spl.objective.loss import LossTerms, SPLLoss
from spl.types import PreferenceBatch, StepOutput

_NOTE = "log 2 = 0.6931 only where alpha = beta"


class PreferenceModule(PolicyModule):
    """Soft Preference Learning of a policy from comparisons (arXiv 2511.08594); DPO where alpha = beta.

    The reference is the starting policy by construction: the policy with its adapters off, a frozen copy where all
    weights train, numbers kept of either (see the callback ReferenceCache), and none where beta is 0.

    Args:
        model: a Hub id, a local folder, a .gguf file (also one in an installed package), or "tiny".
        alpha: entropy coefficient; None takes global_temperature * beta, or beta (which is DPO) without one.
        beta: cross-entropy coefficient; 0 needs no reference.
        global_temperature: alpha / beta, a temperature on whole responses.
        label_smoothing: share of labels believed flipped, in [0, 0.5).
        mass_weight: weight of a term that keeps up the total probability of a prompt's responses and moves no ratio
            between them; ours, not the paper's; 0 is the paper's loss.
        divergence: forward_kl, js or alpha make it f-DPO (arXiv 2309.16240), a baseline that has beta alone; reverse_kl
            is SPL, and DPO.
        divergence_alpha: of the divergence "alpha": above 0; towards 0 it is DPO, at 1 the forward KL.
        kwargs: of Policy.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        alpha: float | None = None,
        beta: float = 0.1,
        global_temperature: float | None = None,
        label_smoothing: float = 0.0,
        mass_weight: float = 0.0,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.loss = SPLLoss(alpha, beta, global_temperature, label_smoothing, mass_weight, divergence, divergence_alpha)
        self.means = HeldOutMeans(MEANS, {"rewards/accuracies": "rewards/num"})
        self.reference: Reference | None = None
        self.cache_folder: Path | None = None  # set before configure_model, by the callback ReferenceCache

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        super().configure_model()
        if self.loss.beta:
            cache = None
            if self.cache_folder:
                owner = f"{self.trainer.default_root_dir} {self.global_rank}" if self._trainer else ""
                cache = LogpCache(self.cache_folder, fingerprint(self.policy), self._number_format(), owner)
            self.reference = Reference(self.policy, self.load_policy, cache)

    def _number_format(self) -> str:
        """What the reference's numbers depend on besides weights and tokens."""
        precision = self.trainer.precision if self._trainer else "32-true"
        dtype: str = self.hparams["dtype"]
        return dtype if precision == "32-true" else f"{dtype}-{precision}"

    @torch.no_grad()
    def reference_logps(self, batch: PreferenceBatch) -> Tensor | None:
        """log pi_ref of the batch's responses [R], nats; None where beta is 0."""
        if self.reference is None:
            return None
        trainer = self._trainer
        strategy = None if trainer is None else trainer.strategy
        together = strategy is not None and is_sharded(self.policy)  # scoring then takes all processes
        return self.reference.logps(
            batch,
            lambda few, model: self.score(few, model).logps,
            strategy.reduce_boolean_decision if strategy is not None and together else bool,
            self.untrained,
        )

    @property
    def has_reference(self) -> bool:
        return self.reference is not None or super().has_reference

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        own = self.reference is None or self.untrained
        with super().as_reference() if own else self.reference.as_model() as model:  # type: ignore[union-attr]
            prepare(model, self.scorer)
            yield model

    @property
    def global_temperature(self) -> float | None:
        loss = self.loss
        return loss.alpha / loss.beta if loss.beta and loss.divergence == "reverse_kl" else None

    def needs_reference_copy(self, batch: PreferenceBatch) -> bool:
        return self.reference is not None and self.reference.needs_copy(batch)

    def needs_reference(self, batch: PreferenceBatch) -> bool:
        """Not where its numbers are kept."""
        if self.reference is None or self.reference.cache is None:
            return self.reference is not None
        return self.reference.cache.get(batch.response_keys) is None

    def evaluate(self, batch: PreferenceBatch, stage: str) -> tuple[StepOutput, Tensor]:
        output, terms = self._evaluate(batch)
        return output, terms.losses

    def figures_of(self, output: StepOutput, batch: PreferenceBatch, stage: str) -> Figures:
        return preference_figures(output, batch)

    def _evaluate(self, batch: PreferenceBatch) -> tuple[StepOutput, LossTerms]:
        reference = self.reference_logps(batch)  # first: the memory it needs is free again when the policy runs
        policy = self.score(batch)
        # Without a reference the loss and the rewards do not look at it.
        reference = torch.full_like(policy.logps, math.nan, requires_grad=False) if reference is None else reference
        terms = self.loss(policy.logps, reference, batch)
        output = StepOutput(
            loss=terms.loss * batch.weight,
            objective=terms.loss.detach(),
            policy_logps=policy.logps.detach(),
            reference_logps=reference,
            entropies=policy.entropies,
            num_response_tokens=policy.num_tokens,
            rewards=terms.rewards,
            margins=terms.margins.detach(),
            shares=batch.shares,
            num_tokens=batch.num_tokens,
        )
        return output, terms

    def loss_of(self, batch: PreferenceBatch) -> Tensor:
        return self._evaluate(batch)[1].loss

    @torch.no_grad()
    def start_check(self, batch: PreferenceBatch) -> StartCheck:
        """Score a batch before training: the first loss to expect, and whether policy and reference agree."""
        reference = self.reference_logps(batch)
        policy = self.score(batch)
        if reference is None:
            return StartCheck(self.loss(policy.logps, policy.logps, batch).loss.item(), None, _NOTE)
        gap = ((policy.logps - reference).abs() / policy.num_tokens).max().item()
        return StartCheck(self.loss(reference, reference, batch).loss.item(), gap, _NOTE)

    def describe(self) -> dict[str, str]:
        reference = "none, since beta is 0" if self.reference is None else self.reference.describe()
        return super().describe() | {"reference": reference, "objective": self.loss.describe()}
