"""Cross-entropy under a reference against transformers' own log-probabilities, one unpadded reply at a time."""

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spl.data.prompts import conversation_prompt
from spl.evaluation.measures import cross_entropy_measures
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.reference import ReferenceLoss, reference_losses
from spl.evaluation.sample_files import Reply
from spl.models import load_tokenizer
from spl.types import Message, UserError

ASKED: list[list[Message]] = [[{"role": "user", "content": "Tea?"}], [{"role": "user", "content": "Or coffee?"}]]


def loss(policy: EvaluatedPolicy, turns: list[Message], reply: Reply) -> tuple[float, int]:
    """By the template, the tokenizer and the logits alone."""
    tokenizer: Any = policy.tokenizer
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    text = tokenizer(prompt + reply.text, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([text + ([] if reply.finish == "length" else [tokenizer.eos_token_id])])
    with torch.no_grad():
        law = policy.model(ids).logits[0].log_softmax(-1)
    return -law[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item(), ids.shape[1] - start


@pytest.mark.parametrize("max_tokens", [20, 4096])
def test_losses_are_those_of_the_model_itself(max_tokens: int) -> None:
    policy = EvaluatedPolicy.load("tiny")
    replies = [
        [Reply("Tea", 4, "stop", None), Reply("Tea", 4, "stop", None), Reply("Tea", 3, "length", None)],
        [Reply("", 1, "stop", None), Reply("", 0, "length", None), Reply("Coffee, of course", 9, "stop", None)],
    ]
    encoder = policy.encoder(turn_end="eos")
    first, second = reference_losses(policy, encoder, {"a": ASKED[0], "b": ASKED[1]}, replies, max_tokens)
    for found, turns, drawn in ((first, ASKED[0], replies[0]), (second, ASKED[1], [replies[1][0], replies[1][2]])):
        expected = [loss(policy, turns, reply) for reply in drawn]
        known = [one for one in found if one is not None]
        assert [one.num_tokens for one in known] == [num for _, num in expected]
        assert [one.value for one in known] == pytest.approx([value for value, _ in expected], abs=1e-3)
        assert not any(one.is_exact for one in known)
    assert second[1] is None  # which has no token


def test_the_tokens_that_were_drawn_are_scored() -> None:
    """They need not be those that the text has; tokens that mean another text to the reference are not its own."""
    policy = EvaluatedPolicy.load("tiny")
    encoder, eos = policy.encoder(turn_end="eos"), policy.tokenizer.eos_token_id
    prompt = list(conversation_prompt(tuple(ASKED[0]), "", encoder).input_ids)
    ids = policy.tokenizer("the", add_special_tokens=False)["input_ids"]
    apart = [policy.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    assert policy.tokenizer.decode(apart) == "the"
    written = Reply("the", len(ids) + 1, "stop", None)
    replies = [
        Reply("the", 4, "stop", None, None, [*apart, eos]),
        Reply("the", 3, "length", None, None, apart),
        Reply("tea", 4, "stop", None, None, [*apart, eos]),
        Reply("the", 3, "stop", None, None, apart),  # ended by a token that is not the reference's
        Reply("the", 2, "stop", None, None, [10**6, eos]),
    ]
    [found] = reference_losses(policy, encoder, {"a": ASKED[0]}, [replies], 4096)
    with torch.no_grad():
        law = policy.model(torch.tensor([[*prompt, *apart, eos]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    exact = -law.gather(1, torch.tensor([*apart, eos])[:, None])[:, 0]
    tea, the = (loss(policy, ASKED[0], reply)[0] for reply in (replies[2], written))
    assert [one and one.is_exact for one in found] == [True, True, False, False, False]
    expected = [exact.sum().item(), exact[:-1].sum().item(), tea, the, the]
    assert [one and one.value for one in found] == pytest.approx(expected, abs=1e-3)


def test_a_reference_without_a_template_takes_tokens_behind_a_space_alone() -> None:
    """Of a policy with a template "the" is all that was drawn; the reference would write " the" behind "Assistant:"."""
    policy = EvaluatedPolicy.load("tiny")
    encoder = policy.encoder(turn_end="eos", template="plain")
    eos, ids, behind = policy.tokenizer.eos_token_id, *policy.tokenizer(["the", " the"])["input_ids"]
    ids, behind = ([token for token in row if token != policy.tokenizer.bos_token_id] for row in (ids, behind))
    replies = [Reply("the", 2, "stop", None, None, [*ids, eos]), Reply("the", 2, "stop", None, None, [*behind, eos])]
    [[other, own]] = reference_losses(policy, encoder, {"a": ASKED[0]}, [replies], 4096)
    assert other and own and (other.is_exact, own.is_exact) == (False, True)
    assert other.value == pytest.approx(own.value, abs=1e-4)


def test_no_more_tokens_are_read_than_the_model_has_positions() -> None:
    """Learnt positions end; a longer reply is one sentence, of which prompt and why, whatever max_length says."""
    config = GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    policy = EvaluatedPolicy("small", GPT2LMHeadModel(config), load_tokenizer("tiny"), torch.device("cpu"))
    encoder = policy.encoder(4096, turn_end="eos")
    assert encoder.max_length == policy.num_positions == 24
    [[found]] = reference_losses(policy, encoder, {"a": ASKED[0]}, [[Reply("Tea", None, "stop", None)]], 4096)
    assert found is not None
    with pytest.raises(UserError, match=r"^a reply to prompt a: .* more than max_length 24; the model has no more pos"):
        reference_losses(policy, encoder, {"a": ASKED[0]}, [[Reply("xyz" * 20, None, "stop", None)]], 4096)
    with pytest.raises(UserError, match="raise max_length"):
        reference_losses(policy, policy.encoder(16), {"a": ASKED[0]}, [[Reply("xyz" * 20, None, "stop", None)]], 4096)


def test_means_are_of_replies_and_of_tokens() -> None:
    losses = [ReferenceLoss(6.0, 2, True), None, ReferenceLoss(3.0, 4, True)]
    replies = [Reply("", 2, "stop", -5.0), Reply("", 0, "length", 0.0), Reply("", 4, "stop", -2.0)]
    found = cross_entropy_measures([replies[0], replies[2]], [losses[0], losses[2]], own_law=True)
    means = {"reference_cross_entropy": 4.5, "reference_cross_entropy_per_token": 1.5}
    assert found == means | {"kl": 1.0, "kl_per_token": 2 / 6}
    others = [ReferenceLoss(6.0, 2, True), ReferenceLoss(3.0, 4, False)]
    for told in (
        cross_entropy_measures([replies[0], replies[2]], others, own_law=True),
        cross_entropy_measures(replies, losses, own_law=False),
        cross_entropy_measures(replies, losses, own_law=True),
    ):
        assert means.items() <= told.items()
        assert math.isnan(told["kl"]) and math.isnan(told["kl_per_token"])
