"""The prompts that monitors ask, and the batch of their replies: against the models' own templates and plain scores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spl.data.base import PreferenceDataModule
from spl.logprobs.score import prepare, score
from spl.logprobs.sequence import sequence_logps
from spl.models import load_policy
from spl.types import Prompt, UserError


def data(tokenizer: Any, path: Path | str = "survey", **options: Any) -> PreferenceDataModule:
    module = PreferenceDataModule(str(path), batch_size=1, **options)
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        max_steps=9,
        check_val_every_n_epoch=1,
        default_root_dir=".",
    )
    module.trainer = trainer  # type: ignore[assignment]
    module.setup("fit")
    return module


def rows(path: Path, *prompts: str) -> Path:
    pairs = ({"prompt": p, "chosen": f"yes {k}", "rejected": "no"} for k, p in enumerate(prompts))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def asked(prompts: list[Prompt]) -> list[str]:
    """The user's turns, out of the tiny model's template."""
    for prompt in prompts:
        assert prompt.text.startswith("<|bos|><|user|>")
        assert prompt.text.endswith("<|end|><|assistant|>")
    return [prompt.text.split("<|user|>")[1].split("<|end|>")[0] for prompt in prompts]


def test_the_first_distinct_prompts_of_the_held_out_data(tmp_path: Path, tiny_tokenizer: Any) -> None:
    held_out = rows(tmp_path / "b.jsonl", "x", "y", "x", "z", "w")
    module = data(tiny_tokenizer, rows(tmp_path / "a.jsonl", "a", "b"), val_path=str(held_out))
    prompts = module.prompts(3)
    assert asked(prompts) == ["x", "y", "z"]
    for prompt in prompts:
        assert tuple(tiny_tokenizer(prompt.text, add_special_tokens=False)["input_ids"]) == prompt.input_ids
    assert asked(module.prompts(9)) == ["x", "y", "z", "w"]


def test_the_training_data_where_nothing_is_held_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = rows(tmp_path / "a.jsonl", "a", "b", "c")
    assert asked(data(tiny_tokenizer, path).prompts(2)) == ["a", "b"]
    assert sorted(asked(data(tiny_tokenizer, path, streaming=True).prompts(5))) == ["a", "b", "c"]


def test_long_prompts_only_where_short_ones_are_too_few(tmp_path: Path, tiny_tokenizer: Any) -> None:
    module = data(tiny_tokenizer, rows(tmp_path / "a.jsonl", "a" * 9, "b" * 7, "c", "d" * 8, "e"))
    # The template adds four tokens to a prompt's letters.
    assert asked(module.prompts(2, max_tokens=5)) == ["c", "e"]
    assert asked(module.prompts(2, max_tokens=11)) == ["b" * 7, "c"]
    assert asked(module.prompts(4, max_tokens=5)) == ["c", "e", "b" * 7, "d" * 8]


def test_texts_are_rendered_by_the_models_template(smollm2_tokenizer: Any) -> None:
    texts = ["Name a colour.", "  Two\n\nlines? "]
    prompts = data(smollm2_tokenizer).prompts(1, texts)
    assert len(prompts) == 2
    for text, prompt in zip(texts, prompts, strict=True):
        turns = [{"role": "user", "content": text}]
        expected = smollm2_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(prompt.input_ids) == expected
        assert prompt.text == smollm2_tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("template", ["model", "plain"])
def test_a_text_has_the_tokens_that_it_has_in_training(
    tmp_path: Path, smollm2_tokenizer: Any, tiny_tokenizer: Any, template: Any
) -> None:
    for tokenizer in (smollm2_tokenizer, tiny_tokenizer):
        module = data(tokenizer, rows(tmp_path / "a.jsonl", "Why?", "A  b\n"), template=template)
        assert module.prompts(2) == module.prompts(2, ["Why?", "A  b\n"])
    plain = "User: Why?\n\nAssistant:"
    assert (module.prompts(1)[0].text == plain) is (template == "plain")


def test_an_empty_text_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="prompt 2 is empty"):
        data(tiny_tokenizer).prompts(2, ["a", " "])


def test_a_batch_of_replies_by_hand(tiny_tokenizer: Any) -> None:
    prompts = [Prompt("", (5, 6)), Prompt("", (5, 7))]
    batch = data(tiny_tokenizer).sample_batch(prompts, [[(8, 9), (8, 9), (8,)], [(9,)]])
    # [5 6 8] and [5 7]: a last token predicts nothing.
    assert batch.input_ids.tolist() == [5, 6, 8, 7]
    assert batch.subtree_end.tolist() == [4, 3, 3, 4]
    assert list(zip(batch.edge_source.tolist(), batch.edge_target.tolist(), strict=True)) == [(1, 8), (2, 9), (3, 9)]
    assert batch.member_edge.tolist() == [0, 1, 0, 1, 0, 2]
    assert batch.member_response.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.response_example.tolist() == [0, 0, 0, 1]
    assert batch.comparisons.shape == (0, 2)
    assert batch.rows == ("prompt 1", "prompt 2")


def test_equal_replies_are_scored_alike_and_as_plain_scoring_does(tiny_tokenizer: Any) -> None:
    model = load_policy("tiny", lora_rank=0)
    module = data(tiny_tokenizer)
    prompts = module.prompts(3)
    replies = [[(40, 41, 257), (40, 41, 257), (40, 41), (257,)], [(257,), (257,)], [(7, 8, 9, 10), (40, 41, 257)]]
    batch = module.sample_batch(prompts, replies)
    with torch.no_grad():
        expected = [
            model(torch.tensor([(*prompt.input_ids, *reply)])).logits[0, -len(reply) - 1 : -1].log_softmax(-1)
            for prompt, drawn in zip(prompts, replies, strict=True)
            for reply in drawn
        ]
        tokens = [torch.tensor(reply) for drawn in replies for reply in drawn]
        logps = torch.stack([law.gather(1, t[:, None]).sum() for law, t in zip(expected, tokens, strict=True)])
        entropies = torch.stack([-(law.exp() * law).sum() for law in expected])
        plain = sequence_logps(model, batch)
        prepare(model, "forest")
        forest = score(model, batch)
    for found in (plain, forest):
        torch.testing.assert_close(found.logps, logps, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.entropies, entropies, rtol=0, atol=1e-4)
        assert found.num_tokens.tolist() == [3, 3, 2, 1, 1, 1, 4, 3]
    assert forest.logps[0] == forest.logps[1]


def test_replies_must_be_given_for_every_prompt(tiny_tokenizer: Any) -> None:
    module = data(tiny_tokenizer)
    with pytest.raises(ValueError, match="shorter"):
        module.sample_batch(module.prompts(2), [[(1,)]])
