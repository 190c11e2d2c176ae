"""Ancestral sampling of many replies to each of several prompts, all in one batch where the model takes padding.

The random numbers of a reply depend on its prompt's seed and its own number alone, not on what else is in the batch:
one process or several draw the same replies, and two models asked with one seed differ by their laws, not by luck.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spl.sampling.decoder import decoder, takes_padding
from spl.sampling.logits import Decoding

_BLOCK = 256  # tokens of the vocabulary that are looked at one by one, once a block is chosen


class Drawn(NamedTuple):
    """One reply."""

    token_ids: tuple[int, ...]  # the EOS token among them, where it has ended
    ended: bool  # false where it was cut at the most tokens
    logp: float  # under the model's own law at temperature 1, whatever it was drawn from, nats
    entropy: float  # of that law at each of its tokens, added up, nats


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[list[tuple[int, ...]]]:
    """The token ids of `draw` at a temperature."""
    drawn = draw(
        model,
        prompts,
        num_samples,
        eos_token_ids=eos_token_ids,
        max_new_tokens=max_new_tokens,
        decoding=Decoding(temperature),
        seeds=seeds,
    )
    return [[reply.token_ids for reply in replies] for replies in drawn]


@torch.no_grad()
def draw(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int = 64,
    decoding: Decoding | None = None,
    seeds: Sequence[int] | None = None,
    first: int = 0,
) -> list[list[Drawn]]:
    """Draw num_samples replies to each prompt, token by token.

    A reply ends with an EOS token, or without one after max_new_tokens.

    Raises:
        FloatingPointError: the model's logits are not finite.

    Args:
        model: a transformers causal language model in evaluation mode, or a PEFT model around one.
        prompts: token ids, at least one each.
        num_samples: replies a prompt.
        eos_token_ids: tokens that end a reply.
        max_new_tokens: most tokens of a reply.
        decoding: how tokens are drawn; from the model's own law by default.
        seeds: of each prompt's random numbers; its index by default.
        first: number of the first reply, where others have been drawn before.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(prompts) > 1 and not takes_padding(model, prompts):
        options: dict[str, Any] = {"eos_token_ids": eos_token_ids, "max_new_tokens": max_new_tokens}
        options |= {"decoding": decoding, "first": first}
        each = zip(prompts, seeds, strict=True)
        return [draw(model, [prompt], num_samples, seeds=[seed], **options)[0] for prompt, seed in each]
    batch = decoder(model, prompts)
    numbers = range(first, first + num_samples)
    uniform = torch.cat([_uniform(seed, numbers, max_new_tokens) for seed in seeds])
    uniform = uniform.to(batch.device, wide(batch.device))
    replies = Growing(len(uniform), eos_token_ids, max_new_tokens, batch.device)
    rows = torch.arange(len(prompts), device=batch.device).repeat_interleave(num_samples)
    while True:
        laws = Laws(batch.logits, decoding or Decoding())
        tokens = laws.tokens(rows, uniform[replies.running, replies.length])
        goes_on = replies.append(tokens, laws.logps(rows, tokens), laws.entropies[rows])
        if not len(replies.running):
            break
        rows = batch.advance(rows[goes_on], tokens[goes_on])
    drawn = replies.finish()
    return [drawn[k : k + num_samples] for k in range(0, len(drawn), num_samples)]


def wide(device: torch.device) -> torch.dtype:
    """What sums of probabilities are held in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _uniform(seed: int, numbers: Iterable[int], length: int) -> Tensor:
    """Random numbers in [0, 1) of the replies to a prompt [replies, length]; longer replies begin with the same."""
    rows = [torch.rand(length, generator=random_numbers(seed * 1_000_003 + k), dtype=torch.float64) for k in numbers]
    return torch.stack(rows)


def random_numbers(seed: int) -> torch.Generator:
    """A generator of a seed of any size; PyTorch takes 64 bits."""
    return torch.Generator().manual_seed(seed % 2**63)


class Growing:
    """Replies as they are drawn.

    Attributes:
        length: tokens of those that have not ended.
        running: their numbers.
    """

    def __init__(self, num: int, ends: Collection[int], most: int, device: torch.device) -> None:
        self.length = 0
        self.running = torch.arange(num, device=device)
        self._ends = torch.tensor(sorted(ends), device=device)
        self.tokens = torch.zeros(num, most, dtype=torch.long, device=device)
        self.lengths = torch.zeros(num, dtype=torch.long, device=device)
        self.ended = torch.zeros(num, dtype=torch.bool, device=device)
        self.logps = torch.zeros(num, dtype=wide(device), device=device)
        self.entropies = torch.zeros_like(self.logps)

    def append(self, tokens: Tensor, logps: Tensor, entropies: Tensor) -> Tensor:
        """The next token of every running reply -> which of them go on, a mask."""
        self.tokens[self.running, self.length] = tokens
        self.logps[self.running] += logps
        self.entropies[self.running] += entropies
        self.length += 1
        self.lengths[self.running] = self.length
        ends = torch.isin(tokens, self._ends)
        self.ended[self.running[ends]] = True
        goes_on = ~ends & (self.length < self.tokens.shape[1])
        self.running = self.running[goes_on]
        return goes_on

    def take(self, which: Tensor) -> None:
        """Go on with these, by their numbers; one may be taken more than once."""
        for name in ("tokens", "lengths", "ended", "logps", "entropies"):
            setattr(self, name, getattr(self, name)[which])
        self.running = (~self.ended).nonzero()[:, 0]

    def finish(self) -> list[Drawn]:
        """All of them, in order."""
        columns = (self.tokens, self.lengths, self.ended, self.logps, self.entropies)
        table = zip(*(column.tolist() for column in columns), strict=True)
        return [Drawn(tuple(tokens[:length]), *rest) for tokens, length, *rest in table]


class Laws:
    """The next-token laws of some rows, to draw from and to score by.

    Attributes:
        log_totals: log-sum-exp of the model's own logits [n].
        entropies: of the model's own laws, nats [n].
        log_drawn_totals: of those that tokens are drawn from [n].

    Args:
        logits: the model's own [n, V].
        decoding: what they are changed by before a token is drawn.

    Raises:
        FloatingPointError: a logit is not a number or infinite.
    """

    def __init__(self, logits: Tensor, decoding: Decoding) -> None:
        self.logits = logits.float() if logits.itemsize < 4 else logits
        self._weights, sums, self.log_totals = _weights(self.logits)
        if not self.log_totals.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        means = (self._weights * self.logits).sum(-1)
        if not means.isfinite().all():  # a logit of -inf, whose weight is 0
            least = torch.finfo(self.logits.dtype).min
            means = (self._weights * self.logits.clamp(min=least)).sum(-1)
        self.entropies = (self.log_totals - means.to(sums) / sums.sum(-1)).clamp(min=0)
        self.log_drawn_totals = self.log_totals
        if not decoding.is_own_law:
            self._weights, sums, self.log_drawn_totals = _weights(decoding.apply(self.logits))
        self._cumulative = sums.cumsum(-1)

    def tokens(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """A token for each reply: where the cumulative distribution of its row's law passes a number in [0, 1).

        First the block of the vocabulary, then the token in it: the sum over all tokens is never written out.

        Args:
            rows: of each reply [m].
            uniform: its number [m].
        """
        cumulative = self._cumulative[rows]
        target = uniform * cumulative[:, -1]
        block = _passed(cumulative, target)
        before = nn.functional.pad(cumulative, (1, 0)).gather(-1, block[:, None])[:, 0]
        start = block * _BLOCK
        inside = start[:, None] + torch.arange(_BLOCK, device=rows.device)
        vocabulary = self._weights.shape[-1]
        weights = self._weights[rows[:, None], inside.clamp(max=vocabulary - 1)] * (inside < vocabulary)
        return start + _passed(weights.to(cumulative).cumsum(-1), target - before)

    def logps(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Of each reply's token [m] under its row's own law, nats."""
        return self.logits[rows, tokens].to(self.log_totals) - self.log_totals[rows]


def _passed(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index at which each row [m, k] is above its target [m], and never one that adds nothing."""
    total = cumulative[:, -1:]
    below = torch.minimum(target[:, None].clamp(min=0), total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True).squeeze(1)


def _weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - their largest) [n, V], its sums over blocks of the vocabulary [n, blocks], the log-sum-exp [n]."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    whole = weights.shape[-1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].reshape(len(weights), whole // _BLOCK, _BLOCK).sum(-1)
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
    sums = sums.to(wide(logits.device))
    return weights, sums, top[:, 0].to(sums) + sums.sum(-1).log()
