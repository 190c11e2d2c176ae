"""The plain definition against one unpadded call of the model for each sequence."""

import pytest
import torch
from tiny_models import EXAMPLES, FAMILIES, KeepFloat64, build, unpadded_logps

from spl.data.collate import collate
from spl.logprobs.sequence import sequence_logps, unpack


def test_unpack_returns_the_sequences_that_were_collated() -> None:
    expected = [
        (list(sequence), len(sequence) - start)
        for example in EXAMPLES
        for sequence, start in zip(example.sequences, example.starts, strict=True)
    ]
    assert [(ids.tolist(), scored) for ids, scored in unpack(collate(EXAMPLES))] == expected


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_equals_unpadded_sequences(family: str) -> None:
    model = build(family, torch.float64)
    with KeepFloat64(), torch.no_grad():
        logps, entropies = unpadded_logps(model, EXAMPLES)
        result = sequence_logps(model, collate(EXAMPLES), rows=4)
    torch.testing.assert_close(result.per_token_logps, torch.cat(logps), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.logps, torch.stack([x.sum() for x in logps]), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.entropies, torch.stack([x.sum() for x in entropies]), rtol=0, atol=1e-9)
    assert result.num_tokens.tolist() == [len(x) for x in logps]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_rows_at_a_time_change_nothing(rows: int) -> None:
    model = build("llama", torch.float64)
    with torch.no_grad():
        expected = sequence_logps(model, collate(EXAMPLES))
        actual = sequence_logps(model, collate(EXAMPLES), rows=rows)
    torch.testing.assert_close(actual.per_token_logps, expected.per_token_logps, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_unpadded_sequences() -> None:
    model = build("llama", torch.float64)
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    with KeepFloat64():
        torch.stack([x.sum() for x in unpadded_logps(model, EXAMPLES)[0]]).mul(weights).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        sequence_logps(model, collate(EXAMPLES)).logps.mul(weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_bfloat16_is_reduced_in_float32_and_entropies_carry_no_gradient() -> None:
    result = sequence_logps(build("llama", torch.bfloat16), collate(EXAMPLES))
    assert result.logps.dtype == result.per_token_logps.dtype == result.entropies.dtype == torch.float32
    assert result.logps.requires_grad and not result.entropies.requires_grad
