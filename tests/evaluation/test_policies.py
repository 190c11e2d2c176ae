"""A policy to evaluate scores as transformers does, and samples after it scored."""

import pytest
import torch

from spl.data.collate import collate
from spl.data.prompts import reply_batch, text_prompts
from spl.evaluation.policies import EvaluatedPolicy
from spl.sampling.generate import sample
from spl.types import PreferenceExample, UserError


def test_scores_are_the_models_own_and_sampling_goes_on() -> None:
    policy = EvaluatedPolicy.load("tiny", device="cpu")
    example = PreferenceExample(({"role": "user", "content": "Hi"},), ("Hello you", "Hello", "No"), ())
    encoded, _ = policy.encoder().encode(example)
    expected = []
    for sequence, start in zip(encoded.sequences, encoded.starts, strict=True):
        ids = torch.tensor(sequence)
        with torch.no_grad():
            laws = policy.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected.append(laws[:-1].gather(1, ids[1:, None])[start - 1 :].sum().item())
    found = policy.score(collate([encoded]))
    assert found.logps.tolist() == pytest.approx(expected, abs=1e-4)

    prompt = text_prompts(["Hi"], policy.encoder())
    (replies,) = sample(policy.model, [prompt[0].input_ids], 2, eos_token_ids=policy.eos_token_ids, max_new_tokens=4)
    laws = policy.laws(reply_batch(prompt, [replies]), global_temperature=2.0)
    torch.testing.assert_close(laws.logps, policy.score(reply_batch(prompt, [replies])).logps)


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="device must be"):
        EvaluatedPolicy.load("tiny", device="cuda:77")
    with pytest.raises(UserError, match="device must be"):
        EvaluatedPolicy.load("tiny", device="abacus")
