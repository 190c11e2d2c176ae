"""A temperature on whole replies: samples of p(y|x)^(1/tau) / Z from a given model, by sequential Monte Carlo.

Token temperature divides every next-token law by its own normaliser, Z_t = sum_v p(v | y_<t)^(1/tau), and so draws from
another law. Here particles are drawn so and weighted by the product of their Z_t; where the weights grow uneven, they
are resampled. Consistent as the number of particles grows, not exact for a finite one (Power-SMC, arXiv 2602.10273).

A reply that is cut counts as it stands: the target is the tempered law of replies cut at max_new_tokens.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spl.sampling.decoder import decoder
from spl.sampling.generate import Drawn, Growing, Laws, random_numbers, wide
from spl.sampling.logits import LEAST_TEMPERATURE, Decoding
from spl.types import UserError

LEAST_ANCESTORS = 0.1


@dataclass(frozen=True)
class Tempering:
    """How a law is tempered.

    Attributes:
        global_temperature: tau, above 1 to flatten, below 1 to sharpen.
        num_particles: of a run.
        num_runs: independent runs, whose spread of log Z shows how far the particles can be trusted.
        resample_below: effective sample size, as a share of the particles, below which a run is resampled.
    """

    global_temperature: float
    num_particles: int = 64
    num_runs: int = 4
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        if not LEAST_TEMPERATURE <= self.global_temperature < math.inf:
            raise UserError(
                f"global_temperature must be a finite number from {LEAST_TEMPERATURE:g} on, but is "
                f"{self.global_temperature}."
            )
        if self.num_particles < 2 or self.num_runs < 2:
            raise UserError(
                f"num_particles and num_runs must be 2 or more, but are {self.num_particles} and {self.num_runs}."
            )
        if not 0 <= self.resample_below <= 1:
            raise UserError(f"resample_below is a share of the particles in [0, 1], but is {self.resample_below}.")

    @property
    def label(self) -> str:
        return f"global {self.global_temperature:g}"


class Tempered(NamedTuple):
    """Replies to one prompt, and how far they can be trusted."""

    replies: list[Drawn]  # of the weighted particles of all runs, by one last systematic resampling
    ancestors: float  # share of a run's first particles that still have descendants, the mean over runs
    effective: float  # sample size of the weights that replies are drawn by, as a share of the particles of all runs
    distinct: int  # different replies; a particle that had ended may have been taken many times over
    log_z: float  # of the tempered law, from all runs, nats
    log_z_spread: float  # standard deviation of log Z over the runs, nats

    @property
    def is_usable(self) -> bool:
        """Whether enough of the first particles survive; of few, the replies are variations of each other.

        Those that were never resampled all do, so that their weights are asked too.
        """
        return min(self.ancestors, self.effective) >= LEAST_ANCESTORS


@torch.no_grad()
def draw_tempered(
    model: nn.Module,
    prompt: Sequence[int],
    num_samples: int,
    tempering: Tempering,
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Tempered:
    """Draw replies to a prompt from the model's law at a global temperature.

    Raises:
        FloatingPointError: the model's logits are not finite.

    Args:
        model: a transformers causal language model in evaluation mode, or a PEFT model around one.
        prompt: token ids, at least one.
        num_samples: replies.
        tempering: how.
        eos_token_ids: tokens that end a reply.
        max_new_tokens: most tokens of a reply.
        seed: of the random numbers.
    """
    batch = decoder(model, [prompt])
    random = random_numbers(seed)
    particles = _Particles(tempering, Growing(_size(tempering), eos_token_ids, max_new_tokens, batch.device), random)
    replies, tau = particles.replies, tempering.global_temperature
    rows = torch.zeros(_size(tempering), dtype=torch.long, device=batch.device)  # those of ended ones mean nothing
    while True:
        laws = Laws(batch.logits, Decoding(tau))
        running = replies.running
        particles.weigh(running, (laws.log_drawn_totals - laws.log_totals / tau)[rows[running]])
        rows = rows[particles.resample()]  # before the token is drawn, so that copies part at once
        running = replies.running
        tokens = laws.tokens(rows[running], particles.uniform(_size(tempering))[running])
        goes_on = replies.append(tokens, laws.logps(rows[running], tokens), laws.entropies[rows[running]])
        if not len(replies.running):
            return particles.finish(num_samples)
        rows[replies.running] = batch.advance(rows[running[goes_on]], tokens[goes_on])


def _size(tempering: Tempering) -> int:
    return tempering.num_runs * tempering.num_particles


class _Particles:
    """The weighted particles of all runs, run by run.

    Attributes:
        replies: of each particle.
    """

    def __init__(self, tempering: Tempering, replies: Growing, random: torch.Generator) -> None:
        self.replies = replies
        self._tempering, self._random = tempering, random
        self._device = replies.tokens.device
        shape = (tempering.num_runs, tempering.num_particles)
        self._log_weights = torch.zeros(shape, dtype=wide(self._device), device=self._device)
        self._log_z = self._log_weights.new_zeros(tempering.num_runs)  # up to the last resampling
        self._ancestors = torch.arange(shape[1], device=self._device).repeat(shape[0], 1)

    def uniform(self, num: int) -> Tensor:
        """Random numbers in [0, 1)."""
        return torch.rand(num, generator=self._random, dtype=torch.float64).to(self._log_weights)

    def weigh(self, which: Tensor, log_weights: Tensor) -> None:
        """Multiply the weights of some; the others have ended and keep theirs."""
        self._log_weights.view(-1)[which] += log_weights

    def resample(self) -> Tensor:
        """Resample the runs whose weights are uneven -> for every particle the one that it goes on from."""
        runs, num = self._log_weights.shape
        index = torch.arange(num, device=self._device).repeat(runs, 1)
        weights = self._log_weights.softmax(-1)
        chosen = systematic(weights, self.uniform(runs), num)
        uneven = _effective(weights) < self._tempering.resample_below
        index[uneven] = chosen[uneven]
        self._log_z[uneven] += self._log_means()[uneven]
        self._log_weights[uneven] = 0.0
        self._ancestors = self._ancestors.gather(-1, index)
        index = (index + torch.arange(runs, device=self._device)[:, None] * num).view(-1)
        if uneven.any():
            self.replies.take(index)
        return index

    def finish(self, num_samples: int) -> Tempered:
        log_z = self._log_z + self._log_means()
        weights = self._log_weights.softmax(-1) * log_z.softmax(-1)[:, None]  # a run counts by its estimate of Z
        weights = weights.view(1, -1)
        chosen = systematic(weights, self.uniform(1), num_samples)[0]
        order = torch.randperm(num_samples, generator=self._random).tolist()  # else neighbours are of one run
        drawn = self.replies.finish()
        replies = [drawn[chosen[k]] for k in order]
        survivors = [len(set(run)) for run in self._ancestors.tolist()]
        return Tempered(
            replies=replies,
            ancestors=sum(survivors) / self._ancestors.numel(),
            effective=_effective(weights).item(),
            distinct=len({reply.token_ids for reply in replies}),
            log_z=(log_z.logsumexp(0) - math.log(len(log_z))).item(),
            log_z_spread=log_z.std().item(),
        )

    def _log_means(self) -> Tensor:
        return self._log_weights.logsumexp(-1) - math.log(self._log_weights.shape[1])


def _effective(weights: Tensor) -> Tensor:
    """Kish's effective sample size of weights that add up to 1 [runs, N], as a share of the particles [runs]."""
    return 1 / (weights.square().sum(-1) * weights.shape[-1])


def systematic(weights: Tensor, uniform: Tensor, num: int) -> Tensor:
    """Indices [runs, num] that take each particle num times its weight, rounded down or up: one random number a run.

    >>> systematic(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0.9]), 4)
    tensor([[0, 0, 1, 2]])

    Args:
        weights: of the particles, each run's adding up to 1 [runs, N].
        uniform: in [0, 1) [runs].
        num: of indices.
    """
    places = (uniform[:, None] + torch.arange(num, device=weights.device)) / num
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, places, right=True).clamp(max=weights.shape[-1] - 1)
