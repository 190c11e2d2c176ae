"""The only entrance to the log-prob engine, for policy and reference alike."""

from typing import Any

import torch
from torch import Tensor, nn

from spl.logprobs.attention import FOREST, Forest, attention
from spl.logprobs.linear import head_of, token_logps
from spl.logprobs.sequence import sequence_logps
from spl.types import PreferenceBatch, ResponseLogps

SCORERS = ("forest", "plain")


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def score(model: nn.Module, batch: PreferenceBatch, scorer: str = "forest", chunk: int = 512) -> ResponseLogps:
    """Log-probabilities and entropies of every response of a batch, in nats and float32.

    Args:
        model: a transformers causal language model, or a PEFT model around one. For "forest" its attention
            implementation must be `spl_forest` (see `prepare`).
        batch: a forest of token tries.
        scorer: "forest" runs each distinct token once; "plain" is the padded definition.
        chunk: head positions projected at a time by "forest".
    """
    if scorer == "plain":
        return sequence_logps(model, batch)
    base: Any = base_of(model)
    hidden = base.get_decoder()(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        forest=Forest(batch.nodes),
    ).last_hidden_state[0]
    edge_logps, edge_entropies = token_logps(hidden[batch.edge_source], batch.edge_target, head_of(base), chunk)
    per_token = edge_logps[batch.member_edge]
    return ResponseLogps(
        logps=_sum_by_response(per_token, batch),
        entropies=_sum_by_response(edge_entropies[batch.member_edge], batch),
        num_tokens=torch.bincount(batch.member_response, minlength=batch.num_responses),
        per_token_logps=per_token,
    )


def _sum_by_response(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """Sum of per-member values [M] over each response -> [R]."""
    return values.new_zeros(batch.num_responses).index_add(0, batch.member_response, values)


def prepare(model: nn.Module, scorer: str) -> None:
    """Set the attention implementation that a scorer needs, for good: a checkpointed backward looks it up again."""
    base: Any = base_of(model)
    base.config.get_text_config()._attn_implementation = FOREST if scorer == "forest" else "sdpa"


@torch.no_grad()
def gap_to_plain(model: nn.Module, batch: PreferenceBatch) -> float:
    """Largest difference, in nats, between the forest's per-token log-probabilities and the plain definition's."""
    base = base_of(model)
    with attention(base, FOREST):
        fast = score(model, batch, "forest").per_token_logps
    with attention(base, "sdpa"):
        plain = score(model, batch, "plain").per_token_logps
    return (fast - plain).abs().max().item()
