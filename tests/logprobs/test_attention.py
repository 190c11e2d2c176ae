"""What forest attention refuses, and a prepared model in ordinary use."""

from typing import Any

import pytest
import torch
from tiny_models import EXAMPLES, build
from torch import Tensor, nn

from spl.data.collate import collate
from spl.logprobs.attention import FOREST, attention, forest_attention
from spl.logprobs.forest import Forest
from spl.logprobs.score import prepare
from spl.types import Node

BATCH = collate(EXAMPLES)


def test_path_of_a_node_is_its_ancestors_and_itself() -> None:
    nodes = (Node(0, 3, -1), Node(3, 5, 0), Node(5, 6, 1), Node(6, 7, 1), Node(7, 9, 0), Node(9, 12, -1))
    forest = Forest(BATCH._replace(nodes=nodes))
    assert forest.paths == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [5]]
    assert forest.lengths == [3, 2, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("unknown", "value"), [("s_aux", torch.ones(2)), ("position_bias", torch.ones(2)), ("dropout", 0.1)]
)
def test_refuses_what_it_does_not_know(unknown: str, value: Any) -> None:
    q = k = v = torch.zeros(1, 2, BATCH.num_tokens, 4)
    with pytest.raises(ValueError, match=unknown):
        forest_attention(nn.Module(), q, k, v, None, forest=Forest(BATCH), **{unknown: value})


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
