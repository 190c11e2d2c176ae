"""The f-divergences of f-DPO (arXiv 2309.16240), a baseline: DPO with another penalty than the reverse KL.

With u = pi(y|x) / pi_ref(y|x), the reward a policy implies is beta f'(u) up to a constant of the prompt. Each f' here
is shifted so that f'(1) = 0, which changes no margin: a policy that is its reference has rewards of 0, as in DPO.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spl.types import UserError

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

LARGEST_EXPONENT = 30.0
"""Of u^(-a) = exp(-a log u). Gradients are as large and their norm squares them, which ends at e^88 in float32."""


def check_divergence(divergence: str, divergence_alpha: float) -> None:
    """Raise a UserError where there is no such divergence."""
    if divergence not in get_args(Divergence):
        raise UserError(f"divergence must be one of {', '.join(get_args(Divergence))}, but is {divergence!r}.")
    if not 0 < divergence_alpha < math.inf:
        raise UserError(f"divergence_alpha must be a number above 0, but is {divergence_alpha}.")


def divergence_derivative(log_ratios: Tensor, divergence: Divergence, divergence_alpha: float = 0.5) -> Tensor:
    """f'(u) - f'(1) from log u, any shape; increasing in log u.

    The forward KL and the alpha-divergence grow as u^(-a) where a policy gives a response less than the reference does
    (a = 1 for the forward KL). Below log u = -LARGEST_EXPONENT / a their value is held, and there it has no gradient.

    Args:
        log_ratios: log pi(y|x) - log pi_ref(y|x), nats.
        divergence: reverse_kl: log u, which is DPO; forward_kl: -1/u; js (Jensen-Shannon): log 2 - softplus(-log u);
            alpha: -u^(-a)/a.
        divergence_alpha: a > 0 of the alpha-divergence: towards 0 it is the reverse KL, at 1 the forward KL, and above
            1 it is steeper than either. (TRL's coefficient is 1 - a.)
    """
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js":
        return math.log(2) - softplus(-log_ratios)
    a = 1.0 if divergence == "forward_kl" else divergence_alpha
    return -torch.expm1((-a * log_ratios).clamp(max=LARGEST_EXPONENT)) / a
