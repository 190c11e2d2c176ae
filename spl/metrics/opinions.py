"""How near a model's shares of the answers come to people's: divergences of two laws over K options.

Shapes: p and q are [..., K], each summing to 1 over the last axis; results are [...] in float64.
"""

import math

import torch
from torch import Tensor


def shares_entropy(p: Tensor) -> Tensor:
    """In nats."""
    entropy: Tensor = torch.special.entr(p.double()).sum(-1)
    return entropy


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence to base 2, in [0, 1].

    H((p + q) / 2) - (H(p) + H(q)) / 2. Its square root is the distance that scipy calls `jensenshannon`.
    """
    p, q = p.double(), q.double()
    nats = shares_entropy((p + q) / 2) - (shares_entropy(p) + shares_entropy(q)) / 2
    return (nats / math.log(2)).clamp(0, 1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]."""
    return (p.double() - q.double()).abs().sum(-1) / 2


def scale_distance(p: Tensor, q: Tensor) -> Tensor:
    """Wasserstein-1 distance of two laws over an ordered scale, over its length K - 1, in [0, 1].

    On a line it is the sum of the differences of the cumulative shares.
    """
    return (p.double() - q.double()).cumsum(-1)[..., :-1].abs().sum(-1) / (p.shape[-1] - 1)
