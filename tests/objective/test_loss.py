"""The SPL loss: it is DPO where alpha equals beta, what leaves it unchanged, and what it refuses.

The answers are written in plain arithmetic, one comparison at a time.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from spl.data.collate import EncodedExample, collate
from spl.objective.loss import SPLLoss, logsumexp_by, mean_by, resolve_alpha, spl_loss
from spl.types import Comparison, UserError

# Two examples: responses 0-1 with one comparison, responses 2-4 with three.
RESPONSE_EXAMPLE = torch.tensor([0, 0, 1, 1, 1])
COMPARISONS = torch.tensor([[0, 1], [2, 3], [4, 2], [3, 4]])
SHARES = torch.tensor([1.0, 0.75, 0.25, 0.5], dtype=torch.float64)
POLICY = torch.tensor([-12.0, -15.5, -7.25, -8.0, -30.0], dtype=torch.float64)
REFERENCE = torch.tensor([-11.0, -16.0, -9.0, -7.5, -25.0], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_loss(i: int, j: int, share: float, alpha: float, beta: float) -> float:
    """-p log sigma(m) - (1 - p) log sigma(-m)."""
    policy, reference = POLICY.tolist(), REFERENCE.tolist()
    m = alpha * (policy[i] - policy[j]) - beta * (reference[i] - reference[j])
    return -share * math.log(sigmoid(m)) - (1 - share) * math.log(sigmoid(-m))


def batch_loss(policy: Tensor = POLICY, reference: Tensor = REFERENCE, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"alpha": 0.3, "beta": 0.1, "comparisons": COMPARISONS, "shares": SHARES} | changes
    return spl_loss(policy, reference, response_example=RESPONSE_EXAMPLE, **settings).loss


class TestDPO:
    """L = -log sigma(beta ((pc - pr) - (rc - rr))) and its gradient, -beta sigma(-z) for the chosen response."""

    beta = 0.1
    chosen, rejected = torch.tensor([0, 2]), torch.tensor([1, 3])

    def test_equal_coefficients_are_dpo(self) -> None:
        policy = POLICY.clone().requires_grad_()
        pairs = torch.stack([self.chosen, self.rejected], 1)
        terms = spl_loss(
            policy, REFERENCE, pairs, torch.ones(2), self.beta, self.beta, response_example=RESPONSE_EXAMPLE
        )
        terms.loss.backward()

        p, r = POLICY.tolist(), REFERENCE.tolist()
        expected, gradient = 0.0, [0.0] * 5
        for c, k in [(0, 1), (2, 3)]:
            z = self.beta * ((p[c] - p[k]) - (r[c] - r[k]))
            expected += -math.log(sigmoid(z)) / 2
            gradient[c] -= self.beta * sigmoid(-z) / 2
            gradient[k] += self.beta * sigmoid(-z) / 2
        assert terms.loss.item() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(policy.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_module_defaults_are_dpo_to_the_last_bit(self, dtype: torch.dtype) -> None:
        batch = two_example_batch(alphas=(None, None))
        policy, reference = POLICY.to(dtype), REFERENCE.to(dtype)
        c, r = batch.comparisons.unbind(1)
        margin = self.beta * (policy[c] - policy[r]) - self.beta * (reference[c] - reference[r])
        assert torch.equal(SPLLoss(beta=self.beta)(policy, reference, batch).margins, margin)


class TestValue:
    def test_soft_labels_mean_over_comparisons_then_examples(self) -> None:
        first = pair_loss(0, 1, 1.0, 0.3, 0.1)
        second = (
            pair_loss(2, 3, 0.75, 0.3, 0.1) + pair_loss(4, 2, 0.25, 0.3, 0.1) + pair_loss(3, 4, 0.5, 0.3, 0.1)
        ) / 3
        assert batch_loss().item() == pytest.approx((first + second) / 2, rel=1e-12)

    def test_losses_of_examples(self) -> None:
        terms = spl_loss(POLICY, REFERENCE, COMPARISONS, SHARES, 0.3, 0.1, response_example=RESPONSE_EXAMPLE)
        assert terms.losses[0].item() == pytest.approx(pair_loss(0, 1, 1.0, 0.3, 0.1), rel=1e-12)
        assert terms.losses.mean() == terms.loss

    def test_an_alpha_for_each_example(self) -> None:
        alpha = torch.tensor([0.5, 2.0], dtype=torch.float64)
        first = pair_loss(0, 1, 1.0, 0.5, 0.1)
        second = (
            pair_loss(2, 3, 0.75, 2.0, 0.1) + pair_loss(4, 2, 0.25, 2.0, 0.1) + pair_loss(3, 4, 0.5, 2.0, 0.1)
        ) / 3
        terms = spl_loss(POLICY, REFERENCE, COMPARISONS, SHARES, alpha, 0.1, response_example=RESPONSE_EXAMPLE)
        assert terms.loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
        assert terms.rewards[0].item() == pytest.approx(0.5 * -12.0 - 0.1 * -11.0)
        assert terms.rewards[4].item() == pytest.approx(2.0 * -30.0 - 0.1 * -25.0)

    def test_label_smoothing_believes_a_share_of_labels_flipped(self) -> None:
        smoothed = 0.9 * SHARES + 0.1 * (1 - SHARES)
        assert smoothed[0] == 0.9
        torch.testing.assert_close(batch_loss(label_smoothing=0.1), batch_loss(shares=smoothed))
        assert not torch.isclose(batch_loss(label_smoothing=0.1), batch_loss())

    def test_mass_term(self) -> None:
        """-lambda log sum_k pi(y_k | x), the mean over examples; pi of whole responses may be far below exp(-700)."""
        policy = POLICY - 1500
        masses = [
            math.log(sum(math.exp(x + 12) for x in group)) - 1512 for group in ([-12.0, -15.5], [-7.25, -8.0, -30.0])
        ]
        added = batch_loss(policy, mass_weight=0.2) - batch_loss(policy)
        assert added.item() == pytest.approx(-0.2 * sum(masses) / 2, rel=1e-12)

    def test_equal_micro_batches_average_to_the_whole(self) -> None:
        first = spl_loss(POLICY[:2], REFERENCE[:2], COMPARISONS[:1], SHARES[:1], 0.3, 0.1, mass_weight=0.2)
        second = spl_loss(POLICY[2:], REFERENCE[2:], COMPARISONS[1:] - 2, SHARES[1:], 0.3, 0.1, mass_weight=0.2)
        torch.testing.assert_close((first.loss + second.loss) / 2, batch_loss(mass_weight=0.2))

    @pytest.mark.parametrize("share", [1.0, 0.7])
    def test_first_loss_is_log_2_where_alpha_is_beta(self, share: float) -> None:
        shares = torch.full((4,), share, dtype=torch.float64)
        assert batch_loss(REFERENCE, alpha=0.1, shares=shares).item() == pytest.approx(math.log(2), rel=1e-12)

    def test_first_loss_elsewhere_comes_from_the_reference(self) -> None:
        """At pi = pi_ref, m = (alpha - beta) * the reference's logratio; a hard label costs softplus(-m)."""
        reference = REFERENCE.tolist()
        expected = math.log1p(math.exp(-(0.3 - 0.1) * (reference[0] - reference[1])))
        pair = torch.tensor([[0, 1]])
        loss = spl_loss(REFERENCE, REFERENCE, pair, torch.ones(1), 0.3, 0.1).loss
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert loss.item() != pytest.approx(math.log(2), rel=0.1)

    def test_huge_margins_stay_finite(self) -> None:
        policy = torch.tensor([-1.0, -1e5], requires_grad=True)
        loss = spl_loss(policy, torch.zeros(2), torch.tensor([[1, 0]]), torch.ones(1), 1.0, 0.1).loss
        loss.backward()
        assert loss.item() == pytest.approx(1e5, rel=1e-4)
        assert policy.grad is not None and policy.grad.tolist() == [1.0, -1.0]


class TestInvariance:
    def test_swapping_a_pair_with_the_other_share(self) -> None:
        torch.testing.assert_close(batch_loss(comparisons=COMPARISONS.flip(1), shares=1 - SHARES), batch_loss())
        assert not torch.isclose(batch_loss(comparisons=COMPARISONS.flip(1)), batch_loss())

    def test_swapping_flips_the_margin(self) -> None:
        margins = spl_loss(POLICY, REFERENCE, COMPARISONS, SHARES, 0.3, 0.1).margins
        flipped = spl_loss(POLICY, REFERENCE, COMPARISONS.flip(1), SHARES, 0.3, 0.1).margins
        assert torch.equal(flipped, -margins)

    @pytest.mark.parametrize("mass_weight", [0.0, 0.2])
    def test_a_constant_of_the_prompt_is_seen_by_the_mass_term_alone(self, mass_weight: float) -> None:
        constant = torch.tensor([3.0, -2.0], dtype=torch.float64)
        shifted = POLICY + constant[RESPONSE_EXAMPLE], REFERENCE - 5 * constant[RESPONSE_EXAMPLE]
        change = batch_loss(*shifted, mass_weight=mass_weight) - batch_loss(mass_weight=mass_weight)
        assert change.item() == pytest.approx(-mass_weight * (3.0 - 2.0) / 2, abs=1e-12)

    def test_beta_0_ignores_the_reference(self) -> None:
        policy = POLICY.clone().requires_grad_()
        absent = torch.full_like(REFERENCE, math.nan)
        terms = spl_loss(policy, absent, COMPARISONS, SHARES, 1.0, 0.0, response_example=RESPONSE_EXAMPLE)
        terms.loss.backward()
        second = (
            pair_loss(2, 3, 0.75, 1.0, 0.0) + pair_loss(4, 2, 0.25, 1.0, 0.0) + pair_loss(3, 4, 0.5, 1.0, 0.0)
        ) / 3
        assert terms.loss.item() == pytest.approx((pair_loss(0, 1, 1.0, 1.0, 0.0) + second) / 2, rel=1e-12)
        assert torch.equal(terms.rewards, POLICY)
        assert policy.grad is not None and policy.grad.isfinite().all()

    def test_only_the_loss_carries_a_gradient_to_the_policy(self) -> None:
        policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone()
        terms = spl_loss(policy, reference, COMPARISONS, SHARES, 0.3, 0.1)
        assert terms.loss.requires_grad and not terms.rewards.requires_grad


def two_example_batch(alphas: tuple[float | None, float | None]) -> Any:
    """The examples above as a batch; the tokens play no part."""
    pair = EncodedExample(((1, 2), (1, 3)), (1, 1), (Comparison(0, 1, 1.0),), alphas[0], "a")
    three = (Comparison(0, 1, 0.75), Comparison(2, 0, 0.25), Comparison(1, 2, 0.5))
    return collate([pair, EncodedExample(((1, 2), (1, 3), (1, 4)), (1, 1, 1), three, alphas[1], "b")])


class TestModule:
    def test_an_example_s_own_alpha_precedes_the_run_s(self) -> None:
        batch = two_example_batch(alphas=(None, 2.0))
        alpha = torch.tensor([0.5, 2.0], dtype=torch.float64)
        expected = spl_loss(
            POLICY, REFERENCE, COMPARISONS, SHARES, alpha, 0.1, mass_weight=0.2, response_example=RESPONSE_EXAMPLE
        )
        loss = SPLLoss(alpha=0.5, beta=0.1, mass_weight=0.2)
        torch.testing.assert_close(loss(POLICY, REFERENCE, batch).losses, expected.losses)

    def test_label_smoothing_reaches_the_loss(self) -> None:
        batch = two_example_batch(alphas=(None, None))
        loss = SPLLoss(alpha=0.3, beta=0.1, label_smoothing=0.1)
        torch.testing.assert_close(loss(POLICY, REFERENCE, batch).loss, batch_loss(label_smoothing=0.1))

    def test_it_has_nothing_to_train_or_save(self) -> None:
        assert not list(SPLLoss().parameters()) and not SPLLoss().state_dict()


class TestSettings:
    @pytest.mark.parametrize(
        ("alpha", "beta", "global_temperature", "expected"),
        [(None, 0.1, None, 0.1), (0.3, 0.1, None, 0.3), (None, 0.2, 1.5, 0.3), (1.0, 0.0, None, 1.0)],
    )
    def test_alpha(self, alpha: float | None, beta: float, global_temperature: float | None, expected: float) -> None:
        assert resolve_alpha(alpha, beta, global_temperature) == pytest.approx(expected, rel=1e-15)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"alpha": 0.0}, "0.0"),
            ({"alpha": -0.5}, "-0.5"),
            ({"alpha": math.nan}, "nan"),
            ({"alpha": math.inf}, "inf"),
            ({"beta": -0.1}, "-0.1"),
            ({"beta": math.nan}, "nan"),
            ({"beta": 0.0}, "beta is 0"),
            ({"beta": 0.0, "global_temperature": 1.5}, "beta = 0"),
            ({"global_temperature": 0.0}, "0.0"),
            ({"global_temperature": math.inf}, "inf"),
            ({"alpha": 0.25, "global_temperature": 1.75}, "0.25"),
            ({"alpha": 0.25, "global_temperature": 1.75}, "1.75"),
            ({"label_smoothing": 0.5}, "0.5"),
            ({"label_smoothing": -0.25}, "-0.25"),
            ({"label_smoothing": math.nan}, "nan"),
            ({"mass_weight": -0.5}, "-0.5"),
            ({"mass_weight": math.inf}, "inf"),
        ],
    )
    def test_a_bad_setting_is_one_sentence_naming_the_value(self, settings: dict[str, float], named: str) -> None:
        with pytest.raises(UserError) as caught:
            SPLLoss(**settings)
        message = str(caught.value)
        assert named in message
        assert any(name in message for name in settings)
        assert message.endswith(".") and not re.search(r"\.\s|\n", message)


def test_group_reductions() -> None:
    values = torch.tensor([1.0, -2000.0, -2000.0, 5.0], dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(mean_by(values, groups, 3), torch.tensor([3.0, -2000.0, 0.0], dtype=torch.float64))
    sums = logsumexp_by(values, groups, 2)
    top = 5 + math.log1p(math.exp(-4))
    torch.testing.assert_close(sums, torch.tensor([top, -2000 + math.log(2)], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(sums.sum(), values)
    expected = torch.tensor([sigmoid(-4), 0.5, 0.5, sigmoid(4)], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
