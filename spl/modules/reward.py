"""A reward model: Bradley-Terry on comparisons, one number read at the end of each reply."""

import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from spl.logprobs.forest import Backend
from spl.logprobs.rewards import plain_states, read_head, score_rewards, state_gap
from spl.logprobs.score import as_forward, base_of, prepare
from spl.models import ExportFormat
from spl.modules.base import PolicyModule, StartCheck
from spl.modules.figures import REWARDS, Figures, HeldOutMeans, reward_figures
from spl.objective.loss import mean_by, spl_loss
from spl.reward_models import empty_classifier, save_reward_model, set_padding
from spl.types import PreferenceBatch, UserError

_TEXTS = ["The quick brown fox jumps over the lazy dog.", "A reply."]  # that the export is tried on


class RewardOutput(TypedDict):
    """What a step returns. Only `loss` carries a gradient."""

    loss: Tensor  # []
    objective: Tensor  # [] mean loss of the batch's examples, detached; `loss` has the weight in its step besides
    rewards: Tensor  # [R]
    margins: Tensor  # [C]
    shares: Tensor  # [C]
    num_tokens: int


class RewardModule(PolicyModule):
    """A reward model: -p log sigma(r_i - r_j) - (1 - p) log sigma(r_j - r_i), where a share p of raters prefers i to j.

    Any causal language model with a head of one number, 0 before training, in place of its vocabulary's. All replies
    to a prompt share its tokens. The export loads with AutoModelForSequenceClassification.

    Args:
        model: a Hub id, a local folder, a .gguf file (also one in an installed package), or "tiny".
        label_smoothing: share of labels believed flipped, in [0, 0.5).
        centring: weight of (r_i + r_j)^2, which keeps rewards about 0 (arXiv 2312.09244); 0.01 is usual.
        kwargs: of Policy.
    """

    task = "reward"
    writes_replies = False

    def __init__(
        self, model: str = "tiny", *, label_smoothing: float = 0.0, centring: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"model.label_smoothing is a share of flipped labels in [0, 0.5), but is {label_smoothing}."
            )
        if not 0 <= centring < math.inf:
            raise UserError(f"model.centring must be a number, 0 or more, but is {centring}.")
        self.label_smoothing = label_smoothing
        self.centring = centring
        self.means = HeldOutMeans(("loss", *REWARDS), {"rewards/accuracies": "rewards/num"})

    @property
    def tokenizer(self) -> Any:
        """With a padding token that ends no reply."""
        if self._tokenizer is None:
            set_padding(super().tokenizer)
        return self._tokenizer

    def load_policy(self) -> nn.Module:
        policy = super().load_policy()
        empty_classifier(base_of(policy), self.tokenizer.pad_token_id)  # or the export would fail after hours
        return policy

    def rewards(self, batch: PreferenceBatch) -> Tensor:
        """Rewards [R] of the batch's responses."""
        if self.scorer == "auto":
            self._choose_scorer(batch)
        prepare(self.policy, self.scorer)
        return score_rewards(self.policy, batch, self.scorer, self.backend)

    def _allowed_gap(self, low: bool) -> tuple[float, str]:
        return 0.1 if low else 1e-3, "of a state's length"

    def _gap_to_plain(self, batch: PreferenceBatch, backend: Backend) -> float:
        return state_gap(self.policy, batch, backend)

    def evaluate(self, batch: PreferenceBatch, stage: str) -> tuple[RewardOutput, Tensor]:
        rewards = self.rewards(batch)
        # The loss of preferences with the reward where SPL has alpha log pi.
        terms = spl_loss(
            rewards,
            rewards,
            batch.comparisons,
            batch.shares,
            alpha=1.0,
            beta=0.0,
            label_smoothing=self.label_smoothing,
            response_example=batch.response_example,
        )
        losses = terms.losses
        if self.centring:
            first, second = batch.comparisons.unbind(1)
            squares = (rewards[first] + rewards[second]) ** 2
            losses = losses + self.centring * mean_by(squares, batch.response_example[first], batch.num_examples)
        loss = losses.mean()
        output = RewardOutput(
            loss=loss * batch.weight,
            objective=loss.detach(),
            rewards=terms.rewards,
            margins=terms.margins.detach(),
            shares=batch.shares,
            num_tokens=batch.num_tokens,
        )
        return output, losses

    def figures_of(self, output: RewardOutput, batch: PreferenceBatch, stage: str) -> Figures:
        figures = reward_figures(output["rewards"], output["margins"], batch)
        return {"loss": (output["objective"], batch.num_examples), **figures}

    def loss_of(self, batch: PreferenceBatch) -> Tensor:
        return self.evaluate(batch, "train")[1].mean()

    @torch.no_grad()
    def start_check(self, batch: PreferenceBatch) -> StartCheck:
        return StartCheck(self.loss_of(batch).item(), None, "log 2 = 0.6931, since all rewards are 0")

    def describe(self) -> dict[str, str]:
        centring = f", centring {self.centring:g}" if self.centring else ""
        return super().describe() | {"objective": f"Bradley-Terry{centring}; one number at the end of a reply"}

    @torch.no_grad()
    def _answers(self) -> Tensor:
        prepare(self.policy, "plain")
        return as_forward(self.policy, lambda: read_head(self.policy, self._states()))

    def _states(self) -> Tensor:
        """Of the texts that the export is tried on."""
        rows = [torch.tensor(self.tokenizer(text)["input_ids"], device=self.device) for text in _TEXTS]
        return plain_states(self.policy, rows)

    def _save(self, policy: nn.Module, folder: Path, export_format: ExportFormat, answers: Tensor) -> float:
        assert export_format == "merged"  # as the callback Export sees to
        return save_reward_model(policy, self.tokenizer, folder, _TEXTS, answers)
