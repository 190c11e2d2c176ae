"""The chunked head against autograd through a plain log-softmax over all logits."""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

from spl.logprobs import linear
from spl.logprobs.linear import Head, head_of, token_logps

EDGES, HIDDEN, WORDS = 7, 4, 9
TARGET = torch.tensor([0, 3, 3, 8, 5, 0, 1])
HEADS = list(itertools.product([False, True], [1.0, 0.4], [None, 1.5]))
CHUNKS = [1, 3, 7, 512]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [E, H], weight [V, H], bias [V]."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((EDGES, HIDDEN), (WORDS, HIDDEN), (WORDS,))
    hidden, weight, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def plain(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    law = torch.distributions.Categorical(logits=logits)
    return law.log_prob(TARGET), law.entropy()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_values_and_gradients(biased: bool, scale: float, softcap: float | None, chunk: int) -> None:
    upstream = torch.linspace(-2, 3, EDGES, dtype=torch.float64)
    results = []
    for function in (plain, lambda h, head: token_logps(h, TARGET, head, chunk)):
        hidden, weight, bias = (x.requires_grad_() for x in tensors())
        logps, entropies = function(hidden, Head(weight, bias if biased else None, scale, softcap))
        leaves = [hidden, weight, bias] if biased else [hidden, weight]
        results.append([logps, entropies, *torch.autograd.grad(logps @ upstream, leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_gradcheck(biased: bool, scale: float, softcap: float | None, chunk: int) -> None:
    hidden, weight, bias = (x.requires_grad_() for x in tensors())

    def logps(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_logps(h, TARGET, Head(w, b, scale, softcap), chunk)[0]

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias) if biased else (hidden, weight))


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias", "hidden and bias"])
def test_gradients_go_where_they_are_asked_for(trains: str) -> None:
    names = ("hidden", "weight", "bias")
    wanted = {n: x.requires_grad_(n in trains) for n, x in zip(names, tensors(), strict=True)}
    token_logps(wanted["hidden"], TARGET, Head(wanted["weight"], wanted["bias"], 0.4, 1.5), 3)[0].sum().backward()
    expected = {n: x.requires_grad_(n in trains) for n, x in zip(names, tensors(), strict=True)}
    plain(expected["hidden"], Head(expected["weight"], expected["bias"], 0.4, 1.5))[0].sum().backward()
    for name in names:
        assert (wanted[name].grad is not None) == (name in trains)
        torch.testing.assert_close(wanted[name].grad, expected[name].grad)


def test_a_frozen_head_makes_no_logits_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = tensors()
    logps, _ = token_logps(hidden.requires_grad_(), TARGET, Head(weight, None), 3)

    def refuse(*_: Any) -> None:
        raise AssertionError("logits were made again")

    monkeypatch.setattr(linear, "_logits", refuse)
    logps.sum().backward()
    assert hidden.grad is not None and weight.grad is None

    monkeypatch.undo()
    trainable = weight.clone().requires_grad_()
    logps, _ = token_logps(hidden, TARGET, Head(trainable, None), 3)
    monkeypatch.setattr(linear, "_logits", refuse)
    with pytest.raises(AssertionError, match="logits were made again"):
        logps.sum().backward()


def test_entropy_carries_no_gradient() -> None:
    hidden, weight, _ = (x.requires_grad_() for x in tensors())
    logps, entropies = token_logps(hidden, TARGET, Head(weight, None))
    assert logps.requires_grad and not entropies.requires_grad


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _ = (x.requires_grad_() for x in tensors())
    logps, _ = token_logps(hidden, TARGET, Head(weight, None))
    (gradient,) = torch.autograd.grad((logps**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bfloat16_is_reduced_in_float32() -> None:
    """The only rounding is that of the inputs: the answer is the float64 one of the same bfloat16 numbers."""
    hidden, weight, bias = tensors(torch.bfloat16)
    logps, entropies = token_logps(hidden.requires_grad_(), TARGET, Head(weight.requires_grad_(), bias, 0.4, 1.5), 3)
    logps.sum().backward()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected, expected_entropies = plain(exact[0], Head(exact[1], bias.double(), 0.4, 1.5))
    expected.sum().backward()

    assert logps.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logps, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies.float(), rtol=1e-5, atol=1e-5)
    for actual, wide in zip((hidden, weight), exact, strict=True):
        assert actual.grad is not None and wide.grad is not None and actual.grad.dtype == torch.bfloat16
        torch.testing.assert_close(actual.grad.double(), wide.grad, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_reach_the_reductions() -> None:
    hidden, weight, bias = tensors(torch.float32)
    expected = token_logps(hidden, TARGET, Head(weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        actual = token_logps(hidden, TARGET, Head(weight, bias))
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("llama", 1.0, None), ("granite", 0.25, None), ("cohere", 0.25, None), ("gemma2_window_4", 1.0, 3.0)],
)
def test_head_of(family: str, scale: float, softcap: float | None) -> None:
    model = build(family)
    head = head_of(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias, head.scale, head.softcap) == (None, scale, softcap)


def test_head_of_refuses_what_is_not_a_plain_linear_layer() -> None:
    class Adapted(nn.Linear):
        pass

    model = build("llama")
    model.set_output_embeddings(Adapted(16, 37))
    with pytest.raises(TypeError, match="Adapted"):
        head_of(model)
