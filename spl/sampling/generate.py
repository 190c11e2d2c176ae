"""Ancestral sampling of many replies to each of several prompts, all in one batch.

A prompt's keys and values are computed once for all of its replies, and replies that have ended leave the batch. The
random numbers of a reply depend on its prompt's seed and its own number alone, not on what else is in the batch: one
process or several draw the same replies, and two models asked with one seed differ by their laws, not by luck.
"""

from collections.abc import Collection, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spl.sampling.cache import growing_cache


@torch.no_grad()
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
    """Draw num_samples replies to each prompt, token by token -> for each prompt a list of token ids a reply.

    A reply ends with an EOS token, or without one after max_new_tokens.

    Raises:
        FloatingPointError: the model's logits are not finite.

    Args:
        model: a transformers causal language model in evaluation mode, or a PEFT model around one.
        prompts: token ids, at least one each.
        num_samples: replies a prompt.
        eos_token_ids: tokens that end a reply.
        max_new_tokens: most tokens of a reply.
        temperature: of every next-token law.
        seeds: of each prompt's random numbers; its index by default.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    decoder = _Decoder(model, prompts, num_samples)
    uniform = torch.cat([_uniform(seed, num_samples, max_new_tokens) for seed in seeds])
    uniform = uniform.to(decoder.device, torch.float32 if decoder.device.type == "mps" else torch.float64)
    ends = torch.tensor(sorted(eos_token_ids), device=decoder.device)
    replies: list[list[int]] = [[] for _ in range(len(uniform))]
    rows = torch.arange(len(uniform), device=decoder.device)  # which reply each row of the batch is
    running = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens = _draw(decoder.logits.float() / temperature, uniform[rows, step])
        for row, token, goes_on in zip(rows.tolist(), tokens.tolist(), running.tolist(), strict=True):
            if goes_on:
                replies[row].append(token)
        running &= ~torch.isin(tokens, ends)
        if step + 1 == max_new_tokens or not running.any():
            break
        if running.sum() <= 0.75 * len(rows):  # moving keys and values is worth it for many rows at a time
            decoder.keep(running)
            rows, tokens, running = rows[running], tokens[running], running[running]
        decoder.advance(tokens)
    return [[tuple(reply) for reply in replies[k : k + num_samples]] for k in range(0, len(replies), num_samples)]


def _uniform(seed: int, num_samples: int, length: int) -> Tensor:
    """Numbers in [0, 1), [num_samples, length]; longer or more replies begin with the same."""
    rows = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + k), dtype=torch.float64)
        for k in range(num_samples)
    ]
    return torch.stack(rows)


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row of logits [n, V], where its law's cumulative distribution passes uniform [n]."""
    law = logits.softmax(-1)
    cumulative = (law if law.device.type == "mps" else law.double()).cumsum(-1)  # Apple's GPUs have no float64
    total, uniform = cumulative[:, -1:], uniform.to(cumulative)
    if not total.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    below = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True).squeeze(1)


class _Decoder:
    """A batch of replies that grow: left-padded prompts, their keys and values, the next token's logits [n, V]."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], repeats: int) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.model: Any = model
        weight = next(model.parameters())
        # Of a sharded model's weights that lie in the CPU's memory, the device is where they are gathered.
        self.device = torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device
        # transformers 5.24 renamed the argument.
        self.cache_name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        self.last_only = "logits_to_keep" in signature(base.forward).parameters
        self.cache: Any = growing_cache(base.config)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        self.logits = self._run(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))
        if repeats > 1:
            self.cache.batch_repeat_interleave(repeats)
        self.mask = self.mask.repeat_interleave(repeats, 0)
        self.logits = self.logits.repeat_interleave(repeats, 0)
        self.lengths = lengths.repeat_interleave(repeats)

    def advance(self, tokens: Tensor) -> None:
        """Append a token [n] to every row."""
        self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits = self._run(tokens[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1

    def keep(self, rows: Tensor) -> None:
        """Let the other rows go; a mask [n]."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {self.cache_name: self.cache, "use_cache": True}
        if self.last_only:
            options["logits_to_keep"] = 1
        output = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions, **options)
        return output.logits[:, -1]  # type: ignore[no-any-return]
