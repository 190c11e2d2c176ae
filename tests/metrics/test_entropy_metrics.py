"""Means over prompts, against numpy."""

import numpy as np
import pytest
import torch

from spl.metrics.entropy import PromptMean

VALUES = [np.random.default_rng(k).gamma(2, 3, size=(n, 2)) for k, n in enumerate((4, 7, 5))]


def filled(values: list[np.ndarray]) -> PromptMean:
    metric = PromptMean(2)
    for own in values:
        metric.update(torch.tensor(own, dtype=torch.float32))
    return metric


def test_mean_and_error_of_fixed_prompts() -> None:
    mean, error = filled(VALUES).compute()
    np.testing.assert_allclose(mean, np.mean([v.mean(0) for v in VALUES], 0), rtol=1e-5)
    spread = np.sqrt(sum(v.var(0, ddof=1) / len(v) for v in VALUES)) / 3
    np.testing.assert_allclose(error, spread, rtol=1e-5)


def test_the_error_is_that_of_other_samples() -> None:
    """Over many draws from two prompts with different laws the mean spreads as the standard error says."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(500):
        metric = PromptMean()
        for scale, shift in ((1.0, 0.0), (3.0, 100.0)):
            metric.update(torch.randn(6, 1, generator=generator) * scale + shift)
        mean, error = metric.compute()
        means.append(float(mean))
        errors.append(float(error) ** 2)
    assert np.std(means) == pytest.approx(np.sqrt(np.mean(errors)), rel=0.1)


def test_sums_of_two_halves_give_the_whole() -> None:
    """What a reduction over processes does with the states."""
    whole, parts = filled(VALUES), [filled(VALUES[:1]), filled(VALUES[1:])]
    for name in ("means", "variances", "num"):
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
        assert parts[0]._reductions[name] is not None
    torch.testing.assert_close(parts[0].compute(), whole.compute())


def test_one_sample_has_no_error() -> None:
    metric = PromptMean()
    metric.update(torch.tensor([[2.0]]))
    mean, error = metric.compute()
    assert float(mean) == 2 and error.isnan()
