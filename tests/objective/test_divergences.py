"""f-DPO: derivatives against those of the divergences' own definitions, and the loss against its formula by hand.

D_f(pi || pi_ref) = E_ref f(u) with u = pi / pi_ref (arXiv 2309.16240, table 1).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spl.data.collate import EncodedExample, collate
from spl.objective.divergences import LARGEST_EXPONENT, Divergence, divergence_derivative
from spl.objective.loss import SPLLoss, spl_loss
from spl.types import Comparison, UserError

LOG_RATIOS = torch.tensor([-3.5, -1.0, -0.01, 0.0, 0.4, 6.0], dtype=torch.float64)


def alpha_generator(a: float) -> Callable[[Tensor], Tensor]:
    return lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


GENERATORS: dict[tuple[Divergence, float], Callable[[Tensor], Tensor]] = {
    ("reverse_kl", 0.5): lambda u: u * u.log(),
    ("forward_kl", 0.5): lambda u: -u.log(),
    ("js", 0.5): lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    ("alpha", 0.5): alpha_generator(0.5),
    ("alpha", 0.3): alpha_generator(0.3),
    ("alpha", 2.0): alpha_generator(2.0),
}


def derivative(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """f'(u) by automatic differentiation of the definition."""
    u = u.clone().requires_grad_()
    return torch.autograd.grad(f(u).sum(), u)[0]


@pytest.mark.parametrize(("divergence", "a"), GENERATORS)
def test_a_derivative_is_that_of_the_definition(divergence: Divergence, a: float) -> None:
    f = GENERATORS[divergence, a]
    expected = derivative(f, LOG_RATIOS.exp()) - derivative(f, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(divergence_derivative(LOG_RATIOS, divergence, a), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("divergence", "a", "by_hand"),
    [
        ("forward_kl", 0.5, lambda u: -1 / u),
        ("js", 0.5, lambda u: math.log(2 * u / (1 + u))),
        ("alpha", 0.5, lambda u: -(u**-0.5) / 0.5),
        ("alpha", 1.5, lambda u: -(u**-1.5) / 1.5),
        # TRL writes exp((c - 1) log u) / (c - 1); its c of 0.7 is our 0.3.
        ("alpha", 0.3, lambda u: math.exp((0.7 - 1) * math.log(u)) / (0.7 - 1)),
    ],
)
def test_the_loss_is_its_formula(divergence: Divergence, a: float, by_hand: Callable[[float], float]) -> None:
    policy, reference, beta = [-12.0, -15.5, -7.25], [-11.0, -16.0, -9.0], 0.1
    u = [math.exp(p - r) for p, r in zip(policy, reference, strict=True)]
    pairs, shares = [(0, 1), (2, 0)], [1.0, 0.75]
    expected = 0.0
    for (i, j), share in zip(pairs, shares, strict=True):
        m = beta * (by_hand(u[i]) - by_hand(u[j]))
        expected += (share * math.log1p(math.exp(-m)) + (1 - share) * math.log1p(math.exp(m))) / 2
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (policy, reference, shares)]
    terms = spl_loss(
        *tensors[:2], torch.tensor(pairs), tensors[2], beta, beta, divergence=divergence, divergence_alpha=a
    )
    assert terms.loss.item() == pytest.approx(expected, rel=1e-12)
    differences = terms.rewards[[0, 2]] - terms.rewards[[1, 0]]
    torch.testing.assert_close(differences, terms.margins)


def test_small_coefficients_approach_dpo_and_one_is_the_forward_kl() -> None:
    torch.testing.assert_close(divergence_derivative(LOG_RATIOS, "alpha", 1e-9), LOG_RATIOS, rtol=1e-7, atol=1e-9)
    forward = divergence_derivative(LOG_RATIOS, "forward_kl")
    torch.testing.assert_close(divergence_derivative(LOG_RATIOS, "alpha", 1.0), forward)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("a", [0.5, 2.0])
def test_extreme_ratios_stay_finite_in_float32(divergence: Divergence, a: float) -> None:
    log_ratios = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    values = divergence_derivative(log_ratios, divergence, a)
    (gradient,) = torch.autograd.grad(values.sum(), log_ratios)
    assert values.isfinite().all() and gradient.isfinite().all()
    assert (values.diff() >= 0).all()


def test_the_range_in_which_a_value_is_exact() -> None:
    """Up to the limit the definition holds, gradient and all; beyond it the value stays and has none."""
    inside, beyond = (LARGEST_EXPONENT - 0.01) / 2, (LARGEST_EXPONENT + 1) / 2
    log_ratios = torch.tensor([-inside, -beyond], dtype=torch.float64, requires_grad=True)
    values = divergence_derivative(log_ratios, "alpha", 2.0)
    (gradient,) = torch.autograd.grad(values.sum(), log_ratios)
    assert values[0].item() == pytest.approx((1 - math.exp(2 * inside)) / 2, rel=1e-12)
    assert gradient[0].item() == pytest.approx(math.exp(2 * inside), rel=1e-12)
    assert values[1].item() == pytest.approx((1 - math.exp(LARGEST_EXPONENT)) / 2, rel=1e-12)
    assert gradient[1].item() == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"divergence": "forward_kl", "alpha": 0.2}, "alpha is 0.2 and beta 0.1"),
        ({"divergence": "js", "global_temperature": 1.5}, "global_temperature"),
        ({"divergence": "js", "alpha": 1.0, "beta": 0.0}, "beta 0"),
        ({"divergence": "kl"}, "reverse_kl, forward_kl, js, alpha, but is 'kl'"),
        ({"divergence": "alpha", "divergence_alpha": 0.0}, "divergence_alpha must be a number above 0"),
        ({"divergence_alpha": math.inf}, "divergence_alpha must be a number above 0"),
    ],
)
def test_what_f_dpo_is_not_is_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SPLLoss(**settings)


def test_an_example_s_own_alpha_is_refused() -> None:
    pair = EncodedExample(((1, 2), (1, 3)), (1, 1), (Comparison(0, 1, 1.0),), 0.5, "file, row 7")
    logps = torch.zeros(2)
    SPLLoss(divergence="reverse_kl")(logps, logps, collate([pair]))
    with pytest.raises(UserError, match=r"file, row 7 has an alpha of its own, but divergence js is f-DPO"):
        SPLLoss(divergence="js")(logps, logps, collate([pair]))


def test_settings_reach_the_loss() -> None:
    pair = EncodedExample(((1, 2), (1, 3)), (1, 1), (Comparison(0, 1, 1.0),), None, "a")
    policy, reference = torch.tensor([-2.0, -1.0]).double(), torch.tensor([-1.0, -1.5]).double()
    terms = SPLLoss(beta=0.5, divergence="alpha", divergence_alpha=2.0)(policy, reference, collate([pair]))
    expected = 0.5 * (-math.exp(2 * 1.0) / 2 + math.exp(-2 * 0.5) / 2)
    assert terms.margins.item() == pytest.approx(expected, rel=1e-12)
