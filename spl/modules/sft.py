"""Supervised fine-tuning on every listed response: the warm-up before preferences."""

from typing import TypedDict

from torch import Tensor

from spl.modules.base import PolicyModule
from spl.modules.figures import over_processes
from spl.types import PreferenceBatch


class SFTOutput(TypedDict):
    """What a step returns. Only `loss` carries a gradient."""

    loss: Tensor  # []
    objective: Tensor  # [] mean loss of the batch's examples, detached; `loss` has the weight in its step besides
    policy_logps: Tensor  # [R]
    num_tokens: int


class SFTModule(PolicyModule):
    """Cross-entropy towards the uniform distribution over each prompt's K responses, -1/K sum_k log pi(y_k|x).

    Its minimum for a prompt is log K nats, where the policy gives every listed response 1/K and nothing to others.
    """

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> SFTOutput:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> SFTOutput:
        return self._shared_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.log("val/non_finite", self.held_out.end())

    def _shared_step(self, batch: PreferenceBatch, stage: str) -> SFTOutput:
        logps = self.score(batch).logps
        counts = batch.response_example.bincount(minlength=batch.num_examples)
        sums = logps.new_zeros(batch.num_examples).index_add(0, batch.response_example, -logps)
        losses = sums / counts
        loss = losses.mean()
        if stage == "train":
            shown = over_processes({"loss": (loss.detach(), batch.num_examples)})["loss"]
            self.log("train/loss", shown, batch_size=batch.num_examples, prog_bar=True)
        elif self.held_out.is_finite(batch, losses):
            self.log(f"{stage}/loss", loss.detach(), batch_size=batch.num_examples, prog_bar=True)
        return SFTOutput(
            loss=self.guard.note(batch, losses, loss * batch.weight) if stage == "train" else loss,
            objective=loss.detach(),
            policy_logps=logps.detach(),
            num_tokens=batch.num_tokens,
        )
