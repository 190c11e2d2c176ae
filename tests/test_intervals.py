"""Intervals against scipy's bootstrap and against theory."""

import numpy as np
import pytest
from scipy import stats

from spl.intervals import bootstrap, draws_of, paired_difference

RANDOM = np.random.default_rng(0)


def test_an_interval_of_means_is_scipys() -> None:
    values = RANDOM.exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    ours = bootstrap(values, draws=4000)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.num == 60


def test_draws_are_means_over_what_was_drawn() -> None:
    """Against the obvious loop over indices, with missing values and several seeds."""
    from spl.intervals import resamples

    values = RANDOM.normal(size=(3, 7))
    values[1, 2] = np.nan
    drawn = resamples(7, 3, draws=20, seed=5)
    expected = [np.nanmean(values[np.ix_(s, p)]) for p, s in zip(drawn.prompts, drawn.seeds, strict=True)]
    np.testing.assert_allclose(draws_of(values, draws=20, seed=5), expected)


def test_training_seeds_add_to_the_spread() -> None:
    """Standard error of crossed effects, seeds s of variance 1 and prompts of none: sqrt((S - 1) / S / S)."""
    seeds = RANDOM.normal(size=8)
    values = np.tile(seeds[:, None], (1, 50))
    assert draws_of(values, draws=8000).std() == pytest.approx(seeds.std() / np.sqrt(8), rel=0.05)
    assert draws_of(values[0], draws=100).std() == pytest.approx(0, abs=1e-12)


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    prompts = RANDOM.normal(scale=5, size=100)
    a, b = prompts + 1 + RANDOM.normal(size=100), prompts + RANDOM.normal(size=100)
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx((a - b).mean())
    half = 1.96 * (a - b).std() / 10
    assert (paired.low, paired.high) == pytest.approx((paired.value - half, paired.value + half), abs=0.08)
    b[3] = np.nan
    assert paired_difference(a, b).value == pytest.approx(np.nanmean(a - b))
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(a, b[1:])


def test_an_interval_covers_as_often_as_it_says() -> None:
    covered = sum(
        found.low <= 1 <= found.high
        for k in range(300)
        if (found := bootstrap(np.random.default_rng(k).normal(1, 2, size=50), draws=400, seed=k))
    )
    assert 0.90 <= covered / 300 <= 0.98


def test_one_prompt_has_no_interval() -> None:
    found = [bootstrap([[0.25], [0.5]]), paired_difference([0.5, np.nan], [0.25, 1.0])]
    assert [(one.value, one.num) for one in found] == [(0.375, 1), (0.25, 1)]
    assert all(np.isnan([one.low, one.high]).all() for one in found)


def test_nothing_known_gives_nothing() -> None:
    assert np.isnan(bootstrap([np.nan, np.nan])).tolist()[:3] == [True] * 3
