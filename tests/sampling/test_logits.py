"""Against transformers' warpers, ties included, and laws worked out by hand."""

import math
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spl.sampling.logits import Decoding, min_p, top_k, top_p
from spl.types import UserError

LAW = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """Spread, sharp, rounded to halves (so that many are equal), and all equal."""
    draw = torch.randn(24, 101, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([draw, 8 * draw, (2 * draw).round() / 2, torch.zeros(2, 101)])
    return torch.cat([rows, torch.full((1, 101), -math.inf).index_fill(1, torch.tensor([3, 70]), 1.0)])


@pytest.mark.parametrize("k", [1, 2, 7, 100, 101, 500])
def test_top_k(logits: torch.Tensor, k: int) -> None:
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_min_p(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize(
    "decoding",
    [Decoding(0.7, top_k=20, top_p=0.8, min_p=0.05), Decoding(1.3, top_p=0.9), Decoding(2.0, 5), Decoding(1.5)],
)
def test_one_after_another(logits: torch.Tensor, decoding: Decoding) -> None:
    warpers: dict[str, Any] = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chosen = [warpers[name](value) for name, value in decoding.filters.items()]
    expected = LogitsProcessorList([TemperatureLogitsWarper(decoding.temperature), *chosen])(None, logits)
    assert torch.equal(decoding.apply(logits), expected)


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Decoding(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Decoding(min_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (Decoding(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Decoding(0.5, top_p=0.8), [16 / 25, 9 / 25, 0, 0]),  # the temperature comes first
        (Decoding(0), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_by_hand(decoding: Decoding, expected: list[float]) -> None:
    torch.testing.assert_close(decoding.apply(LAW.log()).softmax(-1), torch.tensor([expected]))


def test_labels() -> None:
    settings = (Decoding(), Decoding(1.2), Decoding(top_p=0.9), Decoding(1.5, top_k=50, min_p=0.1), Decoding(0))
    assert [d.label for d in settings] == ["t 1", "t 1.2", "top_p 0.9", "t 1.5 top_k 50 min_p 0.1", "greedy"]
    assert [d.is_own_law for d in settings] == [True, False, False, False, False]


@pytest.mark.parametrize(
    "settings",
    [
        "temperature=-1",
        "temperature=inf",
        "temperature=1e-40",
        "temperature=nan",
        "top_k=0",
        "top_p=0",
        "top_p=1.1",
        "min_p=-0.1",
        "min_p=2",
    ],
)
def test_what_is_no_decoding(settings: str) -> None:
    name, value = settings.split("=")
    with pytest.raises(UserError, match=f"^{name} must"):
        Decoding(**{name: float(value)})  # type: ignore[arg-type]
