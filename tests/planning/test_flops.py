"""The operations that a step asks for against those that torch counts in a real one."""

from typing import Any, NamedTuple

import pytest
import torch
from held import flops_of, random_pairs
from test_memory import make_module

from spl.logprobs.lora import FusedLinear
from spl.modules.flops import layers_flops, matrix_sizes, step_flops
from spl.types import PreferenceBatch


class Counted(NamedTuple):
    """Operations of a step as torch counts them, and of them what a frozen input spared."""

    total: float
    spared: float  # gradients of inputs that no weight stands before: of the first layer, where embeddings are frozen


def counted(module: Any, batch: PreferenceBatch) -> Counted:
    spared = 0.0

    def look(layer: Any, args: Any) -> None:
        nonlocal spared
        if torch.is_grad_enabled() and not args[0].requires_grad:
            a = layer.lora_A["default"].weight
            spared += 2.0 * args[0].shape[:-1].numel() * (layer.weight.numel() + a.numel())

    hooks = [m.register_forward_pre_hook(look) for m in module.policy.modules() if isinstance(m, FusedLinear)]
    total = flops_of(lambda: module.loss_of(batch).backward())
    for hook in hooks:
        hook.remove()
    return Counted(total, spared)


def pairs_of(batch: PreferenceBatch) -> tuple[int, int]:
    """(query, key) pairs of every node's path, and those that the mask lets through."""
    ends: list[int] = []
    pairs = seen = 0
    for node in batch.nodes:
        queries = node.end - node.start
        ends.append((ends[node.parent] if node.parent >= 0 else 0) + queries)
        pairs += queries * ends[-1]
        seen += queries * ends[-1] - queries * (queries - 1) // 2
    return pairs, seen


FAMILIES = ("llama", "tied", "qwen2", "qwen3", "phi3", "gpt_neox")


@pytest.mark.parametrize(("family", "rank"), [*((f, r) for f in FAMILIES for r in (8, 0)), ("mixtral", 0)])
def test_torch_counts_what_the_formula_says(family: str, rank: int) -> None:
    module = make_module(family, rank, False, "float32")
    batch = random_pairs(512, 96, 48, 2)
    sizes, found = matrix_sizes(module.policy), counted(module, batch)
    asked = step_flops(sizes, batch)
    # Kernels are counted as if a query saw its node's whole path, and make their scores again in the backward pass: 9
    # products, of which 8 are asked for. A head that trains makes its logits again.
    pairs, seen = pairs_of(batch)
    twice = 2.0 * sizes.attended * (9 * pairs - 8 * seen)
    twice += 0.0 if rank else 2.0 * sizes.head * batch.edge_source.numel()
    assert found.total + found.spared == asked + twice
    assert (found.spared > 0) == (rank > 0)
    assert asked == pytest.approx(found.total, rel=0.13)


def test_checkpointing_repeats_the_layers_forward_pass_but_for_its_last_product() -> None:
    batch = random_pairs(512, 96, 48, 2)
    kept, again = (make_module("llama", 0, checkpointing, "float32") for checkpointing in (False, True))
    more = counted(again, batch).total - counted(kept, batch).total
    sizes, (pairs, seen) = matrix_sizes(kept.policy), pairs_of(batch)
    last = sum(2.0 * batch.num_tokens * layer.mlp.down_proj.weight.numel() for layer in kept.policy.model.layers)
    assert more == layers_flops(sizes, batch) + 4.0 * sizes.attended * (pairs - seen) - last
