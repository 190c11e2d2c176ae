"""Ancestral sampling of many replies to one prompt, whose keys and values are computed once and shared."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Tensor,
    num_samples: int,
    *,
    eos_token_id: int,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Draw replies to a prompt [L] token by token -> num_samples lists of token ids.

    A reply ends with its EOS, or without one after max_new_tokens. The model must be in evaluation mode.
    """
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    cache = DynamicCache(config=base.config)
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
    options: dict[str, Any] = {name: cache, "use_cache": True}
    logits = model(input_ids=prompt_ids[None], **options).logits[:, -1].expand(num_samples, -1)
    cache.batch_repeat_interleave(num_samples)
    done = torch.zeros(num_samples, dtype=torch.bool, device=prompt_ids.device)
    drawn = []
    for _ in range(max_new_tokens):
        token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        drawn.append(token[:, 0].masked_fill(done, eos_token_id))
        done |= token[:, 0] == eos_token_id
        if done.all():
            break
        logits = model(input_ids=drawn[-1][:, None], **options).logits[:, -1]
    return [_until(reply, eos_token_id) for reply in torch.stack(drawn, 1).tolist()]


def _until(reply: list[int], eos_token_id: int) -> list[int]:
    """The reply up to and with its first EOS."""
    return reply[: reply.index(eos_token_id) + 1] if eos_token_id in reply else reply
