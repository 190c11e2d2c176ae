"""Cross-entropy under a reference against transformers' own log-probabilities, one unpadded reply at a time."""

from typing import Any

import pytest
import torch

from spl.evaluation.measures import cross_entropy_measures
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.reference import reference_losses
from spl.evaluation.sample_files import Reply
from spl.types import Message

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
    first, second = reference_losses(policy, encoder, ASKED, replies, max_tokens)
    for found, turns, drawn in ((first, ASKED[0], replies[0]), (second, ASKED[1], [replies[1][0], replies[1][2]])):
        expected = [loss(policy, turns, reply) for reply in drawn]
        assert [num for _, num in found] == [num for _, num in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_means_are_of_replies_and_of_tokens() -> None:
    found = cross_entropy_measures([(6.0, 2), (3.0, 4)])
    assert found == {"reference_cross_entropy": 4.5, "reference_cross_entropy_per_token": 1.5}
