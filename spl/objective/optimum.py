"""Where SPL ends up: the closed-form optimum on a finite set of responses, and the law for two of them."""

import torch
from torch import Tensor


def closed_form_optimum(reference_logps: Tensor, rewards: Tensor, alpha: float, beta: float) -> Tensor:
    """pi*(y|x) = pi_ref(y|x)^(beta/alpha) exp(r(x,y)/alpha) / Z(x), normalised over the last dimension.

    On preferences that follow p_ij = sigma(r_i - r_j), as shares p_ij = s_i / (s_i + s_j) do with r = log s, this is
    the minimiser of the pairwise loss. A constant added to reference_logps or to rewards changes nothing.

    Args:
        reference_logps: [..., K] log pi_ref, nats; ignored where beta is 0.
        rewards: [..., K] r(x, y).
        alpha: entropy coefficient > 0.
        beta: cross-entropy coefficient >= 0.
    """
    scores = rewards if beta == 0 else rewards + beta * reference_logps
    return torch.softmax(scores / alpha, dim=-1)


def two_outcome_share(share: float, reference_share: float, alpha: float, beta: float) -> float:
    """Share the optimum gives an answer that `share` of raters prefer to its one rival.

    Log odds = (log odds of the population + beta * log odds of the reference) / alpha: proportional representation at
    alpha = 1 where the reference is even or beta = 0, and near-certainty for a small alpha.
    """
    odds, reference_odds = torch.tensor([share, reference_share], dtype=torch.float64).logit()
    if beta != 0:  # 0 * inf, where the reference is certain, would be nan
        odds = odds + beta * reference_odds
    return torch.sigmoid(odds / alpha).item()


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of |p - q| over the last dimension, in [0, 1]."""
    return (p - q).abs().sum(-1) / 2
