"""The only entrance to the log-prob engine, for policy and reference alike."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spl.logprobs.attention import FOREST, attention
from spl.logprobs.forest import Backend, Forest
from spl.logprobs.linear import head_of, token_logps
from spl.logprobs.sequence import sequence_logps
from spl.types import Node, PreferenceBatch, ResponseLogps

T = TypeVar("T")

FOREST_LAYERS = {"full_attention", "sliding_attention"}


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, its adapters in place, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def as_forward(model: nn.Module, compute: Callable[[], T]) -> T:
    """Compute something as if it were the model's own forward pass.

    A sharded model gathers what stands outside its layers (embeddings, last norm, head) for that pass alone, and takes
    their gradients by the tensors that come out of it; `spl.modules.sharding` gives it the method.
    """
    run: Callable[[Callable[[], T]], T] | None = getattr(model, "run_as_forward", None)
    return compute() if run is None else run(compute)


def score(
    model: nn.Module,
    batch: PreferenceBatch,
    scorer: str = "forest",
    chunk: int = 512,
    backend: Backend = "auto",
    temperature: float = 1.0,
) -> ResponseLogps:
    """Log-probabilities and entropies of every response of a batch, in nats and float32.

    Args:
        model: a transformers causal language model, or a PEFT model around one. For "forest" its attention
            implementation must be `spl_forest` (see `prepare`).
        batch: a forest of token tries.
        scorer: "forest" runs each distinct token once; "plain" is the padded definition.
        chunk: head positions projected at a time by "forest".
        backend: the attention kernel of "forest"; see `spl.logprobs.kernels`.
        temperature: that each token's logits are divided by.

    Raises:
        RuntimeError: the model is not prepared for "forest": another attention would ignore the forest in silence.
    """
    if scorer == "plain":
        return sequence_logps(model, batch, temperature=temperature)
    return as_forward(model, lambda: _forest_logps(model, batch, chunk, backend, temperature))


def _forest_logps(
    model: nn.Module, batch: PreferenceBatch, chunk: int, backend: Backend, temperature: float
) -> ResponseLogps:
    base = base_of(model)
    states = edge_states(model, batch, backend)
    with precision_of(base):
        head = head_of(base)._replace(temperature=temperature)
        edge_logps, edge_entropies = token_logps(states, batch.edge_target, head, chunk)
    per_token = edge_logps[batch.member_edge]
    return ResponseLogps(
        logps=sum_by_response(per_token, batch),
        entropies=sum_by_response(edge_entropies[batch.member_edge], batch),
        num_tokens=sum_by_response(torch.ones_like(batch.member_response), batch),
        per_token_logps=per_token,
    )


def edge_states(model: nn.Module, batch: PreferenceBatch, backend: Backend = "auto") -> Tensor:
    """Final hidden states of the predicting tokens [E, H], each token of the forest run once; call it in `as_forward`.

    Raises:
        RuntimeError: the model is not prepared for "forest": another attention would ignore the forest in silence.
    """
    base = base_of(model)
    if base.config.get_text_config()._attn_implementation != FOREST:
        raise RuntimeError('call prepare(model, "forest") before scoring with "forest"')
    tokens: dict[str, Any] = {"input_ids": batch.input_ids[None]}
    if next(base.parameters()).dtype == torch.bfloat16:
        tokens = {"inputs_embeds": base.get_input_embeddings()(batch.input_ids[None]).float()}
    with precision_of(base):
        hidden: Tensor = base.get_decoder()(
            **tokens, position_ids=batch.position_ids[None], use_cache=False, forest=Forest(batch, backend)
        ).last_hidden_state[0]
    return hidden[batch.edge_source]


def precision_of(base: nn.Module) -> Any:
    """The context in which a model's products are taken.

    With weights in bfloat16 the products are so too, but what the layers add up is in float32: half the error of sums
    that are rounded at every layer.
    """
    weight = next(base.parameters())
    return torch.autocast(weight.device.type, torch.bfloat16) if weight.dtype == torch.bfloat16 else nullcontext()


def sum_by_response(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """Sum of per-member values [M] over each response -> [R]."""
    return values.new_zeros(batch.num_responses).index_add(0, batch.member_response, values)


def prepare(model: nn.Module, scorer: str) -> None:
    """Set the attention implementation that a scorer needs, for good: a checkpointed backward looks it up again."""
    base = base_of(model)
    base.config.get_text_config()._attn_implementation = FOREST if scorer == "forest" else plain_attention(model)


def plain_attention(model: nn.Module) -> str:
    """transformers' own attention for a model: its "sdpa" knows no soft-cap and no attention sinks."""
    base = base_of(model)
    # transformers 5.17 offers sdpa for a soft-capped model and then leaves the cap out.
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if base._supports_sdpa and not capped else "eager"


def gap_to_plain(model: nn.Module, batch: PreferenceBatch, chunk: int = 512, backend: Backend = "auto") -> float:
    """Largest difference, in nats, between the forest's per-token log-probabilities and the plain definition's.

    Infinite where either is not a number. Raises as `both_ways` does.
    """
    fast, plain = both_ways(model, lambda scorer: score(model, batch, scorer, chunk, backend).per_token_logps)
    gap = (fast - plain).abs().max().item()
    return math.inf if math.isnan(gap) else gap


@torch.no_grad()
def both_ways(model: nn.Module, compute: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """What a function of the scorer's name gives by "forest" and by "plain", without dropout.

    A model that cannot take a forest gives other numbers, or raises whatever its own code raises.

    Raises:
        TypeError: a kind of layer whose difference short examples need not show, such as attention within chunks.
    """
    base = base_of(model)
    if unknown := set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - FOREST_LAYERS:
        raise TypeError(f"the forest knows no layers of type {', '.join(sorted(unknown))}")
    with _evaluating(model):
        with attention(base, FOREST):
            fast = compute("forest")
        with attention(base, plain_attention(model)):
            plain = compute("plain")
    return fast, plain


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def first_examples(batch: PreferenceBatch, n: int) -> PreferenceBatch:
    """The batch of the first n examples: a prefix of all but the tokens, of which those stay that its edges need."""
    responses = int((batch.response_example < n).sum())
    members = int((batch.member_response < responses).sum())
    edges = int(batch.member_edge[:members].max()) + 1
    compared = int((batch.comparisons[:, 0] < responses).sum())
    used = batch.edge_source[:edges].sort().values
    index = torch.arange(batch.num_tokens, device=used.device)
    kept = torch.searchsorted(used, batch.subtree_end) > torch.searchsorted(used, index)  # one used at or below it
    before = nn.functional.pad(kept.cumsum(0), (1, 0))  # the tokens kept before each, which is its new index
    return PreferenceBatch(
        input_ids=batch.input_ids[kept],
        position_ids=batch.position_ids[kept],
        subtree_end=before[batch.subtree_end[kept]],
        nodes=_renumbered(batch.nodes, before.tolist()),
        edge_source=before[batch.edge_source[:edges]],
        edge_target=batch.edge_target[:edges],
        member_edge=batch.member_edge[:members],
        member_response=batch.member_response[:members],
        response_example=batch.response_example[:responses],
        comparisons=batch.comparisons[:compared],
        shares=batch.shares[:compared],
        alphas=batch.alphas[:n],
        rows=batch.rows[:n],
        weight=batch.weight,
        response_keys=batch.response_keys[:responses],
    )


def _renumbered(nodes: tuple[Node, ...], before: list[int]) -> tuple[Node, ...]:
    """The nodes that keep a token, under the new indices; some may now be runs that could be one."""
    kept: list[Node] = []
    number = {-1: -1}
    for k, (start, end, parent) in enumerate(nodes):
        if before[start] < before[end]:
            number[k] = len(kept)
            kept.append(Node(before[start], before[end], number[parent]))
    return tuple(kept)
