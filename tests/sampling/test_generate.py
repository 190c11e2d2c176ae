"""Samples, against the model's own probabilities."""

import math
from collections import Counter

import pytest
import torch

from spl.models import load_model
from spl.sampling.generate import sample


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A tiny model whose next-token law is far from uniform."""
    torch.manual_seed(0)
    model = load_model("tiny").double().eval()
    for p in model.parameters():
        p.data *= 3
    return model


PROMPT = torch.tensor([256, 260, 71, 102])


def test_first_tokens_follow_the_model(model: torch.nn.Module) -> None:
    n = 4000
    with torch.no_grad():
        law = model(input_ids=PROMPT[None]).logits[0, -1].softmax(-1)
    counts = Counter(r[0] for r in sample(model, PROMPT, n, eos_token_id=257, max_new_tokens=1))
    for token in law.topk(5).indices.tolist():
        p = law[token].item()
        assert abs(counts[token] / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_later_tokens_follow_the_model_given_the_earlier(model: torch.nn.Module) -> None:
    n = 6000
    replies = sample(model, PROMPT, n, eos_token_id=257, max_new_tokens=2, seed=3)
    first = Counter(r[0] for r in replies).most_common(1)[0][0]
    after = [r[1] for r in replies if r[0] == first and len(r) > 1]
    with torch.no_grad():
        law = model(input_ids=torch.cat([PROMPT, torch.tensor([first])])[None]).logits[0, -1].softmax(-1)
    token = int(law.argmax())
    p = law[token].item()
    assert len(after) > 100
    assert abs(after.count(token) / len(after) - p) < 4 * math.sqrt(p * (1 - p) / len(after))


def test_a_reply_ends_with_its_first_eos(model: torch.nn.Module) -> None:
    with torch.no_grad():
        likely = int(model(input_ids=PROMPT[None]).logits[0, -1].argmax())
    replies = sample(model, PROMPT, 200, eos_token_id=likely, max_new_tokens=6)
    assert any(len(r) < 6 for r in replies)
    for reply in replies:
        assert likely not in reply[:-1]
        assert len(reply) == 6 or reply[-1] == likely


def test_a_seed_gives_the_same_replies_and_another_others(model: torch.nn.Module) -> None:
    one, two, three = (sample(model, PROMPT, 8, eos_token_id=257, max_new_tokens=5, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one != three


def test_low_temperature_is_greedy(model: torch.nn.Module) -> None:
    with torch.no_grad():
        best = int(model(input_ids=PROMPT[None]).logits[0, -1].argmax())
    assert {r[0] for r in sample(model, PROMPT, 50, eos_token_id=257, max_new_tokens=1, temperature=1e-4)} == {best}
