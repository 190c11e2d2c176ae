"""The SPL loss: a pure function, and a module that holds its settings.

DPO is not a second function: it is `alpha == beta`. f-DPO, a baseline, has other rewards and all else the same.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spl.objective.divergences import Divergence, check_divergence, divergence_derivative
from spl.objective.reward import implicit_reward, margins
from spl.types import PreferenceBatch, UserError


class LossTerms(NamedTuple):
    """The loss and what it was made of."""

    loss: Tensor  # [] mean over examples
    losses: Tensor  # [B] per example, mass term included
    rewards: Tensor  # [R] implicit rewards
    margins: Tensor  # [C]


def mean_by(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean of values [N] within each group (groups [N] holds indices < num_groups) -> [num_groups]."""
    sums = values.new_zeros(num_groups).index_add(0, groups, values)
    return sums / torch.bincount(groups, minlength=num_groups).clamp(min=1)


def logsumexp_by(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """log sum exp of values [N] within each group -> [num_groups]; every group needs a value."""
    # The shift only guards against overflow, so it takes no gradient.
    top = values.detach().new_full((num_groups,), -math.inf).scatter_reduce(0, groups, values.detach(), "amax")
    return top + values.new_zeros(num_groups).index_add(0, groups, (values - top[groups]).exp()).log()


def spl_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    comparisons: Tensor,
    shares: Tensor,
    alpha: float | Tensor,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    mass_weight: float = 0.0,
    response_example: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> LossTerms:
    """The SPL loss of a batch of comparisons (arXiv 2511.08594).

    For response i preferred to j by a share p of raters, with m = r_i - r_j the margin of implicit rewards,
    L = -p log sigma(m) - (1 - p) log sigma(-m). An example's loss is the mean over its comparisons, and the batch's
    the mean over its examples, so that gradient accumulation over equal micro-batches is exact.

    Args:
        policy_logps: [R] log pi(y|x), nats, summed over each response's tokens.
        reference_logps: [R] log pi_ref(y|x), no gradient; ignored where beta is 0.
        comparisons: [C, 2] indices into the responses.
        shares: [C] share of raters who prefer the first, in [0, 1].
        alpha: entropy coefficient > 0, one number or [B] one for each example.
        beta: cross-entropy coefficient >= 0.
        label_smoothing: in [0, .5): the share that is believed flipped; p becomes (1 - e) p + e (1 - p).
        mass_weight: lambda >= 0 of the mass term -lambda logsumexp_k log pi(y_k|x) over a prompt's responses. It pulls
            the total probability of the listed responses up and no ratio between them, so the optimum's shares stay.
            It is not in the paper; 0 is the paper's loss.
        response_example: [R] index of each response's example, ascending from 0; None: all belong to one example.
        divergence: "reverse_kl" is SPL, and DPO; another one is f-DPO, whose rewards are beta f'(pi / pi_ref): it has
            no alpha, and the one given is not looked at.
        divergence_alpha: of the divergence "alpha", see `divergence_derivative`.
    """
    if response_example is None:
        response_example = torch.zeros_like(policy_logps, dtype=torch.long)
    num_examples = int(response_example[-1]) + 1
    comparison_example = response_example[comparisons[:, 0]]
    alpha_r = alpha_c = alpha
    if isinstance(alpha, Tensor) and alpha.ndim > 0:
        alpha_r, alpha_c = alpha[response_example], alpha[comparison_example]
    if divergence == "reverse_kl":
        m = margins(policy_logps, reference_logps, comparisons, alpha_c, beta)
        rewards = implicit_reward(policy_logps, reference_logps, alpha_r, beta)
    else:
        rewards = beta * divergence_derivative(policy_logps - reference_logps, divergence, divergence_alpha)
        m = rewards[comparisons[:, 0]] - rewards[comparisons[:, 1]]
    p = (1 - label_smoothing) * shares + label_smoothing * (1 - shares)
    pairwise = -p * logsigmoid(m) - (1 - p) * logsigmoid(-m)
    losses = mean_by(pairwise, comparison_example, num_examples)
    if mass_weight:
        losses = losses - mass_weight * logsumexp_by(policy_logps, response_example, num_examples)
    return LossTerms(losses.mean(), losses, rewards.detach(), m)


def resolve_alpha(alpha: float | None, beta: float, global_temperature: float | None) -> float:
    """alpha from either of its two names; with neither, alpha = beta, which is DPO.

    Raises:
        UserError: both were given, or a value is out of range.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise UserError(f"beta is the cross-entropy coefficient and must be 0 or more, but got {beta}.")
    if alpha is not None and global_temperature is not None:
        raise UserError(
            f"alpha ({alpha}) and global_temperature ({global_temperature}) are two names of one setting "
            "(global_temperature = alpha / beta): give one of them, and set one that a config gives to null."
        )
    if global_temperature is not None:
        if not (math.isfinite(global_temperature) and global_temperature > 0):
            raise UserError(f"global_temperature is alpha / beta and must be above 0, but got {global_temperature}.")
        if beta == 0:
            raise UserError("global_temperature is alpha / beta and has no meaning at beta = 0: give alpha instead.")
        return global_temperature * beta
    if alpha is None:
        if beta == 0:
            raise UserError("beta is 0 and no alpha was given: give alpha, the entropy coefficient, above 0.")
        return beta
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha is the entropy coefficient and must be above 0, but got {alpha}.")
    return alpha


class SPLLoss(nn.Module):
    """Settings of the SPL loss, applied to a batch.

    Args:
        alpha: entropy coefficient; None takes `global_temperature * beta`, or beta (DPO) if that is None too.
        beta: cross-entropy coefficient; 0 needs no reference.
        global_temperature: alpha / beta, the temperature on whole responses.
        label_smoothing: share of labels believed flipped, in [0, .5).
        mass_weight: weight of the mass term (see `spl_loss`); 0 is the paper's loss.
        divergence: other than "reverse_kl" it is f-DPO, which has beta alone.
        divergence_alpha: of the divergence "alpha".

    Raises:
        UserError: a setting is out of range, alpha was given twice, or f-DPO with an alpha that is not beta.
    """

    def __init__(
        self,
        alpha: float | None = None,
        beta: float = 0.1,
        global_temperature: float | None = None,
        label_smoothing: float = 0.0,
        mass_weight: float = 0.0,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"label_smoothing is a share of flipped labels in [0, 0.5), but got {label_smoothing}.")
        if not (math.isfinite(mass_weight) and mass_weight >= 0):
            raise UserError(f"mass_weight must be 0 or more, but got {mass_weight}.")
        check_divergence(divergence, divergence_alpha)
        self.alpha = resolve_alpha(alpha, beta, global_temperature)
        if divergence != "reverse_kl" and self.alpha != beta:
            raise UserError(
                f"divergence {divergence} is f-DPO, which has one coefficient, but alpha is {self.alpha:g} and beta "
                f"{beta:g}: leave alpha and global_temperature out (null), or set divergence to reverse_kl."
            )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.mass_weight = mass_weight
        self.divergence: Divergence = divergence
        self.divergence_alpha = divergence_alpha

    def forward(self, policy_logps: Tensor, reference_logps: Tensor, batch: PreferenceBatch) -> LossTerms:
        """policy_logps and reference_logps [R] -> the terms of the loss. An example's own alpha precedes the run's.

        Raises:
            UserError: an example has an alpha of its own under f-DPO.
        """
        if self.divergence != "reverse_kl":
            self._refuse_own_alphas(batch)
        # In the dtype of the log-probabilities, so that alpha == beta cancels exactly.
        alphas = torch.where(batch.alphas.isnan(), self.alpha, batch.alphas.to(policy_logps.dtype))
        return spl_loss(
            policy_logps,
            reference_logps,
            batch.comparisons,
            batch.shares,
            alphas,
            self.beta,
            label_smoothing=self.label_smoothing,
            mass_weight=self.mass_weight,
            response_example=batch.response_example,
            divergence=self.divergence,
            divergence_alpha=self.divergence_alpha,
        )

    def describe(self) -> str:
        """The objective in a few words."""
        mass = f", mass term {self.mass_weight:g} (not the paper's)" if self.mass_weight else ""
        if self.divergence != "reverse_kl":
            a = f" {self.divergence_alpha:g}" if self.divergence == "alpha" else ""
            return f"f-DPO with the divergence {self.divergence}{a}, beta {self.beta:g}{mass}"
        ratio = f", alpha/beta {self.alpha / self.beta:.4g}" if self.beta else ""
        name = " (DPO)" if self.alpha == self.beta else ""
        return f"alpha {self.alpha:g}, beta {self.beta:g}{ratio}{name}{mass}"

    def _refuse_own_alphas(self, batch: PreferenceBatch) -> None:
        own = [row for row, none in zip(batch.rows, batch.alphas.isnan().tolist(), strict=True) if not none]
        if own:
            raise UserError(
                f"{own[0]} has an alpha of its own, but divergence {self.divergence} is f-DPO, which has none: leave "
                "it out of the data, or set divergence to reverse_kl."
            )
