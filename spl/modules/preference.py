"""Preference training: the policy, the frozen reference, the SPL loss."""

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spl.models import frozen_copy
from spl.modules.base import PolicyModule
from spl.modules.memory import estimate_peak_memory
from spl.objective.loss import LossTerms, SPLLoss
from spl.types import PreferenceBatch, StepOutput

log = logging.getLogger(__name__)


class StartCheck(NamedTuple):
    """What the first step should find."""

    expected_loss: float  # of pi = pi_ref on a batch; log 2 only where alpha = beta and labels are hard
    gap: float | None  # largest |log pi - log pi_ref| a token; None without a reference


class PreferenceModule(PolicyModule):
    """Soft Preference Learning of a policy from comparisons (arXiv 2511.08594); DPO where alpha = beta.

    The reference is the starting policy by construction: the policy with its adapters off, a frozen copy where all
    weights train, and none where beta is 0.

    Args:
        model: a Hub id, a local folder, a .gguf file (also one in an installed package), or "tiny".
        alpha: entropy coefficient; None takes global_temperature * beta, or beta (which is DPO) without one.
        beta: cross-entropy coefficient; 0 needs no reference.
        global_temperature: alpha / beta, a temperature on whole responses.
        label_smoothing: share of labels believed flipped, in [0, 0.5).
        mass_weight: weight of a term that keeps up the total probability of a prompt's responses and moves no ratio
            between them; ours, not the paper's; 0 is the paper's loss.
        kwargs: of PolicyModule.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.loss = SPLLoss(alpha, beta, global_temperature, label_smoothing, mass_weight)

    def configure_model(self) -> None:
        built = hasattr(self, "policy")
        super().configure_model()
        if not built and self.loss.beta and not self.trains_adapters:
            # Outside the module tree: no optimiser, no checkpoint and no wrapper sees it.
            self.__dict__["_reference"] = frozen_copy(self.policy)

    @property
    def reference(self) -> nn.Module | None:
        """The frozen copy of full fine-tuning; None where the reference is the policy without adapters, or none is."""
        copy: nn.Module | None = self.__dict__.get("_reference")
        return copy

    @torch.no_grad()
    def reference_logps(self, batch: PreferenceBatch) -> Tensor | None:
        """log pi_ref of the batch's responses [R], nats; None where beta is 0."""
        if not self.loss.beta:
            return None
        if self.reference is None:
            with self.policy.disable_adapter():  # type: ignore[operator]
                return self.score(batch).logps
        return self.score(batch, self.reference.to(self.device)).logps

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> StepOutput:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> StepOutput:
        return self._shared_step(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> StepOutput:
        return self._shared_step(batch, "test")

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> StepOutput:
        return self._evaluate(batch)[0]

    def _shared_step(self, batch: PreferenceBatch, stage: str) -> StepOutput:
        output, terms = self._evaluate(batch)
        self.check_finite(terms.losses, batch.rows)
        self._log(output, batch, stage)
        return output

    def _evaluate(self, batch: PreferenceBatch) -> tuple[StepOutput, LossTerms]:
        reference = self.reference_logps(batch)  # first: the memory it needs is free again when the policy runs
        policy = self.score(batch)
        # Without a reference the loss and the rewards do not look at it.
        reference = torch.full_like(policy.logps, math.nan, requires_grad=False) if reference is None else reference
        terms = self.loss(policy.logps, reference, batch)
        output = StepOutput(
            loss=terms.loss,
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

    def _log(self, output: StepOutput, batch: PreferenceBatch, stage: str) -> None:
        """Means over examples, comparisons and responses; each is weighted by the count it is a mean of."""
        first, second = batch.comparisons.unbind(1)
        chosen_first = batch.shares >= 0.5
        sign = torch.where(chosen_first, 1.0, -1.0)
        chosen, rejected = torch.where(chosen_first, first, second), torch.where(chosen_first, second, first)
        decided = batch.shares != 0.5  # a tie has no right answer
        num_decided = int(decided.sum())
        right = ((output["margins"] * sign > 0) & decided).sum() / max(num_decided, 1)
        logps, tokens = output["policy_logps"], output["num_response_tokens"]
        everywhere: dict[str, Any] = {
            "on_step": stage == "train",
            "on_epoch": stage != "train",
            "sync_dist": stage != "train",
        }
        count = len(batch.shares)
        self.log(f"{stage}/loss", output["objective"], batch_size=batch.num_examples, prog_bar=True, **everywhere)
        for name, value, weight in (
            ("rewards/margins", (output["margins"] * sign).mean(), count),
            ("rewards/accuracies", right, num_decided),
            ("rewards/chosen", output["rewards"][chosen].mean(), count),
            ("rewards/rejected", output["rewards"][rejected].mean(), count),
            ("logps/chosen", logps[chosen].mean(), count),
            ("logps/rejected", logps[rejected].mean(), count),
            ("logps/chosen_per_token", (logps[chosen] / tokens[chosen]).mean(), count),
            ("entropy", output["entropies"].sum() / tokens.sum(), int(tokens.sum())),
        ):
            shown = name in ("rewards/margins", "rewards/accuracies")
            self.log(f"{stage}/{name}", value, batch_size=weight, prog_bar=shown, **everywhere)
        self.log(f"{stage}/rewards/num", float(num_decided), reduce_fx="sum", **everywhere)

    def loss_of(self, batch: PreferenceBatch) -> Tensor:
        """The loss of a batch, with its graph; logs nothing."""
        return self._evaluate(batch)[1].loss

    @torch.no_grad()
    def start_check(self, batch: PreferenceBatch) -> StartCheck:
        """Score a batch before training: the first loss to expect, and whether policy and reference agree."""
        reference = self.reference_logps(batch)
        policy = self.score(batch)
        if reference is None:
            return StartCheck(self.loss(policy.logps, policy.logps, batch).loss.item(), None)
        gap = ((policy.logps - reference).abs() / policy.num_tokens).max().item()
        return StartCheck(self.loss(reference, reference, batch).loss.item(), gap)

    def peak_memory(self, batch: PreferenceBatch) -> float:
        """Estimated bytes of a training step on a batch."""
        return estimate_peak_memory(
            self.policy,
            batch,
            head_chunk=self.hparams["head_chunk"],
            checkpointing=self.hparams["gradient_checkpointing"],
            reference_copy=self.reference is not None,
        )

    def describe(self) -> dict[str, str]:
        loss = self.loss
        ratio = f", alpha/beta {loss.alpha / loss.beta:.4g}" if loss.beta else ""
        name = " (DPO)" if loss.alpha == loss.beta else ""
        mass = f", mass term {loss.mass_weight:g} (not the paper's)" if loss.mass_weight else ""
        if not loss.beta:
            reference = "none, since beta is 0"
        elif self.trains_adapters:
            reference = "the policy with its adapters off"
        else:
            reference = "a frozen copy of the starting policy"
        return super().describe() | {
            "reference": reference,
            "objective": f"alpha {loss.alpha:g}, beta {loss.beta:g}{ratio}{name}{mass}",
        }
