"""Supervised fine-tuning: the policy learns to write the replies of the data, from what stands before them."""

import math
from typing import Any, Literal, TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from spl.modules.base import PolicyModule, StartCheck
from spl.modules.figures import Figures, HeldOutMeans
from spl.objective.imitation import imitation_losses
from spl.objective.loss import mean_by
from spl.types import PreferenceBatch, ResponseLogps, UserError

Weighting = Literal["token", "response"]


class SFTOutput(TypedDict):
    """What a step returns. Only `loss` carries a gradient."""

    loss: Tensor  # [] what is differentiated
    objective: Tensor  # [] mean loss of the batch's tokens or examples, detached
    policy_logps: Tensor  # [R] in training by GEM of its law, the policy's at another temperature
    entropies: Tensor  # [R] of the same law
    num_response_tokens: Tensor  # [R]
    num_tokens: int


class SFTModule(PolicyModule):
    """Supervised fine-tuning on replies alone; what stands before them is context.

    Conversations are packed without padding, and all replies of one share its tokens.

    Args:
        model: a Hub id, a local folder, a .gguf file (also one in an installed package), or "tiny".
        weighting: "token" takes the mean over all reply tokens of an optimiser step, whatever its micro-batches and
            devices; "response" the mean over examples of -1/K sum_k log pi(y_k|x), K being an example's replies. That
            has its minimum, log K nats, where the policy gives each of K listed replies 1/K and others nothing.
        gem_temperature: train by GEM (arXiv 2408.16673), which keeps more diversity than cross-entropy; its paper takes
            0.7. Null is cross-entropy. Held-out figures are cross-entropies in any case.
        kwargs: of Policy.
    """

    task = "sft"

    def __init__(
        self,
        model: str = "tiny",
        *,
        weighting: Weighting = "token",
        gem_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if weighting not in get_args(Weighting):
            raise UserError(f"model.weighting must be token or response, but is {weighting!r}.")
        if gem_temperature is not None and not 0 < gem_temperature < math.inf:
            raise UserError(f"model.gem_temperature must be a number above 0, or null, but is {gem_temperature}.")
        self.by_token = weighting == "token"
        self.gem_temperature = gem_temperature
        self.means = HeldOutMeans(("loss", "nll", "token_entropy"))
        self._step_tokens = 0  # of the optimiser step under way

    def on_train_start(self) -> None:
        super().on_train_start()
        self._step_tokens = 0

    def evaluate(self, batch: PreferenceBatch, stage: str) -> tuple[SFTOutput, Tensor]:
        temperature = self.gem_temperature if stage == "train" else None
        scored, losses = self._losses(batch, temperature)
        objective = self._mean(losses, batch)
        if self.by_token and stage == "train":
            # The step's number of tokens is known when all of its micro-batches are: see on_before_optimizer_step.
            self._step_tokens += _num_reply_tokens(batch)
            loss = losses.sum()
        else:
            loss = objective * batch.weight
        output = SFTOutput(
            loss=loss,
            objective=objective.detach(),
            policy_logps=scored.logps.detach(),
            entropies=scored.entropies,
            num_response_tokens=scored.num_tokens,
            num_tokens=batch.num_tokens,
        )
        return output, losses

    def _losses(self, batch: PreferenceBatch, gem_temperature: float | None) -> tuple[ResponseLogps, Tensor]:
        """Also the loss of each example [B]: summed over its tokens, or that sum's mean over its replies."""
        scored = self.score(batch, temperature=gem_temperature or 1.0)
        losses = imitation_losses(scored.logps, scored.entropies, gem_temperature)
        if not self.by_token:
            return scored, mean_by(losses, batch.response_example, batch.num_examples)
        return scored, losses.new_zeros(batch.num_examples).index_add(0, batch.response_example, losses)

    def _mean(self, losses: Tensor, batch: PreferenceBatch) -> Tensor:
        return losses.sum() / (_num_reply_tokens(batch) if self.by_token else batch.num_examples)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the step's gradient, a sum over tokens, their mean: over all micro-batches and processes."""
        if self.by_token:
            count, world = torch.tensor(float(self._step_tokens), device=self.device), self.trainer.world_size
            if dist.is_initialized() and world > 1:
                dist.all_reduce(count)
            # Lightning has divided by the micro-batches, and the strategy by the processes.
            factor = world * self.trainer.accumulate_grad_batches / count.item()
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
            self._step_tokens = 0
        super().on_before_optimizer_step(optimizer)

    def figures_of(self, output: SFTOutput, batch: PreferenceBatch, stage: str) -> Figures:
        tokens = _num_reply_tokens(batch)
        figures = {"loss": (output["objective"], tokens if self.by_token else batch.num_examples)}
        if stage != "train" or self.gem_temperature is None:  # else it would be of GEM's law, not the policy's
            figures["token_entropy"] = (output["entropies"].sum() / tokens, tokens)
        if stage != "train":
            figures["nll"] = (-output["policy_logps"].sum() / tokens, tokens)
        return figures

    def held_out_figures(self) -> dict[str, Tensor]:
        figures = super().held_out_figures()
        return figures | {"perplexity": figures.pop("nll").exp()}

    def loss_of(self, batch: PreferenceBatch) -> Tensor:
        return self._mean(self._losses(batch, self.gem_temperature)[1], batch)

    @torch.no_grad()
    def start_check(self, batch: PreferenceBatch) -> StartCheck:
        unit = "token of the replies" if self.by_token else "reply"
        return StartCheck(self.loss_of(batch).item(), None, f"nats a {unit}")

    def describe(self) -> dict[str, str]:
        name = "cross-entropy" if self.gem_temperature is None else f"GEM, temperature {self.gem_temperature:g}"
        mean = "mean over reply tokens" if self.by_token else "mean over examples of the mean over their replies"
        return super().describe() | {"objective": f"{name}, {mean}"}


def _num_reply_tokens(batch: PreferenceBatch) -> int:
    """Of all replies; known without waiting for the device."""
    return batch.member_response.numel()
