"""Forest attention against a dense softmax under the mask rule, and a prepared model in ordinary use."""

from typing import Any

import pytest
import torch
from tiny_models import EXAMPLES, build
from torch import Tensor, nn

from spl.data.collate import collate
from spl.logprobs.attention import FOREST, Forest, attention, forest_attention
from spl.logprobs.score import prepare
from spl.types import Node

BATCH = collate(EXAMPLES)
HEADS, KEY_HEADS, DIM = 4, 2, 6


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return tuple(
        torch.randn(1, h, BATCH.num_tokens, DIM, generator=draw, dtype=torch.float64).requires_grad_() for h in heads
    )  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    """Token i sees token j where j <= i < subtree_end[j], and no deeper than the window above it."""
    i, j = torch.arange(BATCH.num_tokens)[:, None], torch.arange(BATCH.num_tokens)[None, :]
    seen = (j <= i) & (i < BATCH.subtree_end[None, :])
    if window is not None:
        seen &= BATCH.position_ids[:, None] - BATCH.position_ids[None, :] < window
    k, v = k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)
    scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(seen, scores, -torch.inf)
    return torch.einsum("nhqk,nhkd->nqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_equals_dense_attention_under_the_mask_rule(window: int | None, softcap: float | None) -> None:
    q, k, v = tensors()
    upstream = torch.randn(1, BATCH.num_tokens, HEADS, DIM, generator=torch.Generator().manual_seed(1)).double()
    expected = dense(q, k, v, 0.7, window, softcap)
    settings: dict[str, Any] = {"scaling": 0.7, "sliding_window": window, "softcap": softcap}
    actual, _ = forest_attention(nn.Module(), q, k, v, None, forest=Forest(BATCH.nodes), **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad((actual * upstream).sum(), (q, k, v)),
        torch.autograd.grad((expected * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_spans_of_a_node_are_its_ancestors_and_itself() -> None:
    forest = Forest((Node(0, 3, -1), Node(3, 5, 0), Node(5, 6, 1), Node(6, 7, 1), Node(7, 9, 0), Node(9, 12, -1)))
    assert forest.spans(3) == [(0, 3), (3, 5), (6, 7)]
    assert forest.spans(4) == [(0, 3), (7, 9)]
    assert forest.spans(5) == [(9, 12)]


@pytest.mark.parametrize("unknown", ["s_aux", "position_bias"])
def test_refuses_what_it_does_not_know(unknown: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=unknown):
        forest_attention(nn.Module(), q, k, v, None, forest=Forest(BATCH.nodes), **{unknown: torch.zeros(HEADS)})


@pytest.mark.parametrize("family", ["llama", "mistral_window_4", "gemma2_window_4", "gpt2"])
class TestPreparedModelInOrdinaryUse:
    """Between scoring steps the same model writes samples: padded on the left, one token at a time over a cache."""

    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])

    @pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 2)], ids=["padded", "unpadded"])
    def test_generation(self, family: str, rows: slice) -> None:
        model = build(family)
        prepare(model, "plain")
        expected = self.generate(model, self.ids[rows])
        prepare(model, "forest")
        torch.testing.assert_close(self.generate(model, self.ids[rows]), expected, rtol=1e-4, atol=1e-4)

    def generate(self, model: Any, ids: Tensor) -> Tensor:
        """Logits [steps, N, V] along greedy continuations."""
        result = model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            generation_config=type(model.generation_config)(
                max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            ),
        )
        return torch.stack(result.logits)

    @pytest.mark.parametrize("padded", [False, True])
    def test_logits_of_a_right_padded_batch(self, family: str, padded: bool) -> None:
        model = build(family)
        real = torch.tensor([7, 4 if padded else 7])[:, None] > torch.arange(7)
        arguments = {"input_ids": self.ids.flip(0, 1) * real, "attention_mask": real.long() if padded else None}
        prepare(model, "plain")
        expected = model(**arguments).logits
        prepare(model, "forest")
        torch.testing.assert_close(model(**arguments).logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_attention_is_put_back() -> None:
    model = build("llama")
    with attention(model, FOREST):
        assert model.config._attn_implementation == FOREST
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), attention(model, FOREST):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_the_name_is_not_saved_with_the_model(tmp_path: Any) -> None:
    model = build("llama")
    prepare(model, "forest")
    model.save_pretrained(tmp_path)
    assert FOREST not in (tmp_path / "config.json").read_text()
