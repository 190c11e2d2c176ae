"""Divergences of shares against scipy and by hand."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, wasserstein_distance

from spl.metrics.opinions import jensen_shannon, scale_distance, shares_entropy, total_variation


@pytest.mark.parametrize("num", [2, 3, 7])
def test_scipy_says_the_same(num: int) -> None:
    p, q = np.random.default_rng(num).dirichlet(np.full(num, 0.5), size=(2, 20))
    ours, theirs = torch.from_numpy(p), torch.from_numpy(q)
    # scipy's is the distance: the root of the divergence.
    assert jensen_shannon(ours, theirs).tolist() == pytest.approx(jensenshannon(p, q, base=2, axis=1) ** 2)
    assert shares_entropy(ours).tolist() == pytest.approx(entropy(p, axis=1))
    places = np.arange(num)
    expected = [wasserstein_distance(places, places, a, b) / (num - 1) for a, b in zip(p, q, strict=True)]
    assert scale_distance(ours, theirs).tolist() == pytest.approx(expected)
    assert total_variation(ours, theirs).tolist() == pytest.approx(np.abs(p - q).sum(1) / 2)


def test_ends_by_hand() -> None:
    left, middle, right = torch.eye(3)
    assert jensen_shannon(left, right).item() == pytest.approx(1)
    assert jensen_shannon(left, left).item() == 0
    assert scale_distance(left, right).item() == pytest.approx(1)
    assert scale_distance(left, middle).item() == pytest.approx(1 / 2)
    assert total_variation(left, middle).item() == pytest.approx(1)
    assert shares_entropy(torch.tensor([0.5, 0.5, 0.0])).item() == pytest.approx(np.log(2))
