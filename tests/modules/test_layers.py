"""Compiled layers score as plain ones, and are compiled once for batches of every size."""

from typing import Any

import pytest
import torch

from spl.data.collate import EncodedExample, collate
from spl.logprobs.lora import FusedLinear
from spl.logprobs.score import prepare, score
from spl.models import frozen_copy, load_policy
from spl.modules.layers import compile_layers, decoder_layers


# What torch's compiler warns of as it looks at an autograd function and at tensors on the way.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_the_layers(checkpointing: bool) -> None:
    pairs = [((1, 2, k, 4, 5, 6)[: 4 + k % 3], (1, 2, k, 7, 8, 9)) for k in range(10, 18)]
    examples = [EncodedExample(pair, (3, 3), (), None, "") for pair in pairs]
    batches = [collate(examples[:size]) for size in (1, 2, 5, 8)]
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.manual_seed(0)
    policy = load_policy("tiny", lora_rank=4, lora_layer=FusedLinear, gradient_checkpointing=checkpointing)
    plain = frozen_copy(policy).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" in name)
    compile_layers(policy, checkpointing, backend)
    assert len(decoder_layers(policy)) == 2
    for model in (policy, plain):
        prepare(model, "forest")
    for number, batch in enumerate(batches):
        for model in (policy, plain):
            score(model, batch).logps.sum().backward()
        if number == 0:
            first = graphs
    assert graphs == first > 2
    for own, expected in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (expected.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad, expected.grad)
