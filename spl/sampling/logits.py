"""Temperature, top-k, top-p and min-p: pure functions of logits [n, V], equal to transformers' warpers.

Removed tokens have the logit -inf. Each keeps at least one token.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from spl.types import UserError

LEAST_TEMPERATURE = 1e-6  # logits divided by less would leave float32


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn from a model's next-token law; as it stands it is the model's own.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: number of most likely tokens to keep.
        top_p: keep the fewest most likely tokens whose probabilities add up to it (nucleus sampling, arXiv 1904.09751).
        min_p: keep tokens at least this share as likely as the most likely one (arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature must be 0 or a finite number from {LEAST_TEMPERATURE:g} on, but is {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be 1 or more tokens, or null for all, but is {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and be at most 1, but is {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], but is {self.min_p}.")

    @property
    def label(self) -> str:
        """As "t 1", "t 1.2", "top_p 0.9" or "t 1.2 min_p 0.1"; "greedy" at temperature 0."""
        if self.temperature == 0:
            return "greedy"
        filters = [f"{name} {value:g}" for name, value in self.filters.items()]
        return " ".join(filters if filters and self.temperature == 1 else [f"t {self.temperature:g}", *filters])

    @property
    def filters(self) -> dict[str, float]:
        """Those that are set, by name."""
        values = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def is_own_law(self) -> bool:
        """Whether tokens come from the model's law itself."""
        return self.temperature == 1 and not self.filters

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [n, V] to draw from, in transformers' order: temperature, top-k, top-p, min-p."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return logits.new_full(logits.shape, -math.inf).scatter(-1, best, 0.0)
        logits = logits if self.temperature == 1 else logits / self.temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        return logits if self.min_p is None else min_p(logits, self.min_p)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Remove what is less likely than the k-th most likely token; its equals stay, so there may be more than k."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Remove the least likely tokens whose probabilities add up to at most 1 - p.

    >>> import torch
    >>> top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7).exp()  # 0.5 alone is less than 0.7
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Remove tokens whose probability is below p times the most likely one's."""
    law = logits.softmax(-1)
    return logits.masked_fill(law < p * law.amax(-1, keepdim=True), -math.inf)
