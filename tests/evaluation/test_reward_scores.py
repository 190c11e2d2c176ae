"""Rewards of replies against transformers' own classifier, asked one unpadded text at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from spl.evaluation.rewards import RewardScorer, caveat
from spl.models import load_model, load_tokenizer
from spl.reward_models import as_classifier, load_reward_model, set_padding
from spl.types import UserError

ASKED = [
    [{"role": "user", "content": "Coffee or tea?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Cats?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Or dogs?"},
    ],
]
REPLIES = [["Coffee.", "Tea, of course, and nothing else.", "", "Coffee."], ["Dogs"]]


def one_by_one(model: Any, tokenizer: Any) -> list[list[float]]:
    """By the template and the model alone."""
    rewards = []
    for turns, replies in zip(ASKED, REPLIES, strict=True):
        rendered = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
            for reply in replies
        ]
        rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in rendered]
        with torch.no_grad():
            rewards.append([model(**row).logits.item() for row in rows])
    return rewards


def saved(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=256, eos_token_id=257, **settings)
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("padding", [258, 257, None], ids=["own", "the EOS", "none"])
def test_rewards_of_anyones_model(tmp_path: Path, padding: int | None) -> None:
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    model = llama(num_labels=1, pad_token_id=padding).eval()
    scorer = RewardScorer.load(saved(tmp_path, model, tokenizer), device="cpu")
    expected = one_by_one(model, tokenizer)
    found = scorer.score(ASKED, REPLIES)
    assert [len(row) for row in found] == [4, 1]
    for row, by_hand in zip(found, expected, strict=True):
        assert row == pytest.approx(by_hand, abs=1e-5)
    assert len({round(r, 6) for row in expected for r in row}) == 4


def test_how_well_held_out_replies_are_told_apart_is_said(tmp_path: Path) -> None:
    """The interval by scipy."""
    name = str(tmp_path / "export")
    assert caveat(name) == []
    for share, num, doubt in ((0.5, 120, True), (0.75, 120, False), (0.1, 40, False)):
        end = {"val/rewards/accuracies": share, "val/rewards/num": float(num)}
        (tmp_path / "summary.json").write_text(json.dumps({"end": end}))
        low, high = binomtest(round(share * num), num).proportion_ci(method="wilson")
        (said,) = caveat(name)
        assert f"in {share:.0%} of {num} comparisons [{low:.0%}, {high:.0%}]" in said
        assert ("not to be told from chance" in said) == doubt
    (tmp_path / "summary.json").write_text('{"end": {"val/loss": 1.0}}')
    assert caveat(name) == []


@pytest.mark.parametrize("padding", [258, 257, None], ids=["own", "the EOS", "none"])
def test_replies_share_their_prompt(padding: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    model = llama(num_labels=1, pad_token_id=padding).eval()
    scorer, ran = RewardScorer(model, tokenizer), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: ran.append(args[0].numel()))
    scorer.score(ASKED[:1], [["a", "b"]])
    ran.clear()
    replies = [f"{k}" for k in range(10)]
    (found,) = scorer.score(ASKED[:1], [replies])
    turns = [[*ASKED[0], {"role": "assistant", "content": reply}] for reply in replies]
    rows = [tokenizer.apply_chat_template(each, return_dict=False) for each in turns]
    prompt = tokenizer.apply_chat_template(ASKED[0], add_generation_prompt=True, return_dict=False)
    assert sum(ran) <= len(prompt) + sum(len(row) - len(prompt) for row in rows) < sum(map(len, rows)) / 3
    with torch.no_grad():
        assert found == pytest.approx([model(torch.tensor([row])).logits.item() for row in rows], abs=1e-5)


@pytest.mark.parametrize("other", ["head", "network", "config"])
def test_a_model_that_reads_otherwise_is_read_row_by_row(other: str) -> None:
    """Of two layers in its head, of a state that depends on the whole row, of a kind of layer that no forest knows."""
    tokenizer, model = load_tokenizer("tiny"), llama(num_labels=1, pad_token_id=258).eval()
    if other == "head":
        model.score = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    elif other == "network":
        model.model.norm.register_forward_hook(lambda _, args, states: states - states.mean(1, keepdim=True))
    else:
        model.config.layer_types, model.config.attention_chunk_size = ["chunked_attention"] * 2, 512
    found = RewardScorer(model, tokenizer, batch_tokens=1).score(ASKED, REPLIES)
    for row, by_hand in zip(found, one_by_one(model, tokenizer), strict=True):
        assert row == pytest.approx(by_hand, abs=1e-5)


def test_batches_change_nothing_and_long_conversations_lose_their_beginning() -> None:
    model, tokenizer = load_reward_model("tiny")
    whole = RewardScorer(model, tokenizer).score(ASKED, REPLIES)
    small = RewardScorer(model, tokenizer, batch_tokens=64).score(ASKED, REPLIES)
    assert small[0] == pytest.approx(whole[0], abs=1e-5)
    text = tokenizer.apply_chat_template([*ASKED[1], {"role": "assistant", "content": "Dogs"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (cut,) = RewardScorer(model, tokenizer, max_length=24).score(ASKED[1:], REPLIES[1:])
    with torch.no_grad():
        expected = model(torch.tensor([ids[:1] + ids[-23:]])).logits.item()
    assert cut == pytest.approx([expected], abs=1e-5)


def test_the_same_network_under_a_head(tmp_path: Path) -> None:
    policy, tokenizer = load_model("tiny").eval(), load_tokenizer("tiny")
    head = torch.linspace(-1, 1, 64)[None]
    again = AutoModelForSequenceClassification.from_pretrained(
        saved(tmp_path, as_classifier(policy, head, 258), tokenizer)
    ).eval()
    ids = torch.tensor([[256, 65, 66, 67]])
    with torch.no_grad():
        last = policy.model(ids).last_hidden_state[0, -1]
        assert again(ids).logits.item() == pytest.approx(float(last @ head[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "sentence"), [({}, "expected one label, but its config has 2"), ({"num_labels": 1}, "have no score")]
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, labels: dict[str, int], sentence: str) -> None:
    policy = load_model("tiny")
    for name, value in labels.items():
        setattr(policy.config, name, value)
    with pytest.raises(UserError, match=sentence):
        load_reward_model(saved(tmp_path, policy, load_tokenizer("tiny")))


def test_the_padding_token_ends_no_reply() -> None:
    tokenizer = load_tokenizer("tiny")
    set_padding(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    tokenizer.pad_token = tokenizer.eos_token
    set_padding(tokenizer)
    assert tokenizer.pad_token == "<|bos|>"


def test_an_architecture_without_classification() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = CohereConfig(**sizes, num_attention_heads=1, pad_token_id=0, eos_token_id=1)
    with pytest.raises(UserError, match="no sequence classification for cohere"):
        as_classifier(CohereForCausalLM(config), torch.zeros(1, 8), 0)


def test_no_more_tokens_are_read_than_the_model_has_positions() -> None:
    """A long conversation is cut to them, as it is to max_length."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=258)
    scorer = RewardScorer(GPT2ForSequenceClassification(config).eval(), load_tokenizer("tiny"))
    assert scorer.encoder.max_length == 23
    ((short, long),) = scorer.score([ASKED[0]], [["Tea.", "xyz" * 30]])
    assert isinstance(short, float) and isinstance(long, float)
