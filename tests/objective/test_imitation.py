"""GEM by its formula, all logits at hand, against one pass of the chunked head at its temperature."""

import pytest
import torch

from spl.logprobs.linear import Head, token_logps
from spl.objective.imitation import imitation_losses

TARGET = torch.tensor([0, 3, 3, 8, 5, 0, 1])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.4, None), (0.4, 1.5)])
@pytest.mark.parametrize("chunk", [3, 512])
def test_gem_by_its_formula(temperature: float, scale: float, softcap: float | None, chunk: int) -> None:
    """-sum_v q_v (log f_y - log f_v), q = softmax(z / t) without gradient (arXiv 2408.16673)."""
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in ((7, 4), (9, 4), (9,))]
    hidden, weight, bias = leaves
    logits = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_f, q = logits.log_softmax(-1), (logits / temperature).softmax(-1).detach()
    expected = -(q * (log_f.gather(1, TARGET[:, None]) - log_f)).sum(-1)
    upstream = torch.linspace(0.5, 3, 7, dtype=torch.float64)
    gradients = torch.autograd.grad(expected @ upstream, leaves)

    logps, entropies = token_logps(hidden, TARGET, Head(weight, bias, scale, softcap, temperature), chunk)
    found = imitation_losses(logps, entropies, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for actual, by_formula in zip(torch.autograd.grad(found @ upstream, leaves), gradients, strict=True):
        torch.testing.assert_close(actual, by_formula, rtol=1e-12, atol=1e-12)


def test_cross_entropy() -> None:
    logps, entropies = torch.tensor([-1.5, -0.25]), torch.tensor([7.0, 8.0])
    assert torch.equal(imitation_losses(logps, entropies, None), -logps)
