"""What is drawn against every reply that there can be: a real model with four tokens, replies of at most four."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from spl.sampling.generate import Drawn, draw
from spl.sampling.global_temperature import Tempering, draw_tempered, systematic
from spl.sampling.logits import Decoding
from spl.types import UserError

EOS, MOST = 0, 4
PROMPT = [1, 2, 1]
Reply = tuple[int, ...]


@pytest.fixture(scope="module")
def model() -> Any:
    """Its laws are far from uniform and differ with the text before them."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, eos_token_id=EOS, bos_token_id=1, **sizes)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


@pytest.fixture(scope="module")
def next_law(model: Any) -> Callable[[Reply], list[float]]:
    """The model's law after the prompt and the beginning of a reply."""
    texts = [reply for length in range(MOST) for reply in itertools.product(range(1, 4), repeat=length)]
    with torch.no_grad():
        laws = {t: model(input_ids=torch.tensor([[*PROMPT, *t]])).logits[0, -1].softmax(-1).tolist() for t in texts}
    return laws.__getitem__


def enumerated(next_law: Callable[[Reply], list[float]], change: Callable[[list[float]], list[float]]) -> Any:
    """The probability of every reply, where each next-token law is changed and normalised."""
    found: dict[Reply, float] = {}

    def follow(reply: Reply, probability: float) -> None:
        if len(reply) == MOST or reply[-1:] == (EOS,):
            found[reply] = probability
            return
        law = change(next_law(reply))
        for token, p in enumerate(law):
            follow((*reply, token), probability * p / sum(law))

    follow((), 1.0)
    return found


def own(law: list[float]) -> list[float]:
    return law


def check(replies: list[Drawn], law: dict[Reply, float], own_law: dict[Reply, float]) -> None:
    """Frequencies by a chi-square test, rare replies taken together; what each says of itself, exactly."""
    counts = Counter(reply.token_ids for reply in replies)
    assert all(law[reply] > 0 for reply in counts)
    common = [reply for reply, p in law.items() if p * len(replies) >= 8]
    assert len(common) > 10
    expected = [law[reply] * len(replies) for reply in common]
    observed: list[float] = [counts[reply] for reply in common]
    rare = [len(replies) - sum(expected), len(replies) - sum(observed)]
    assert chisquare([*observed, rare[1]], [*expected, rare[0]]).pvalue > 0.001
    for reply in replies[:200]:
        assert reply.logp == pytest.approx(math.log(own_law[reply.token_ids]), abs=1e-9)
        assert reply.ended == (reply.token_ids[-1] == EOS)


def nucleus(law: list[float]) -> list[float]:
    kept: list[int] = []
    for token in sorted(range(4), key=lambda k: -law[k]):
        if sum(law[k] for k in kept) < 0.95:
            kept.append(token)
    return [p if k in kept else 0.0 for k, p in enumerate(law)]


@pytest.mark.parametrize(
    ("decoding", "change"),
    [
        (Decoding(), own),
        (Decoding(1.6), lambda law: [p ** (1 / 1.6) for p in law]),
        (Decoding(0.7), lambda law: [p ** (1 / 0.7) for p in law]),
        (Decoding(top_p=0.95), nucleus),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_token_by_token(model: Any, next_law: Any, decoding: Decoding, change: Any) -> None:
    options: dict[str, Any] = {"eos_token_ids": {EOS}, "max_new_tokens": MOST, "decoding": decoding}
    replies = draw(model, [PROMPT], 4000, seeds=[5], **options)[0]
    check(replies, enumerated(next_law, change), enumerated(next_law, own))
    later = draw(model, [PROMPT], 10, seeds=[5], first=3990, **options)[0]
    assert later == replies[3990:]


def test_entropies_add_up_to_that_of_whole_replies(model: Any, next_law: Any) -> None:
    """Each is a sum of conditional entropies, exactly; their mean is the entropy of the law of all replies."""
    law = enumerated(next_law, own)
    entropy = -sum(p * math.log(p) for p in law.values())
    replies = draw(model, [PROMPT], 4000, seeds=[7], eos_token_ids={EOS}, max_new_tokens=MOST)[0]
    for reply in replies[:50]:
        beginnings = [next_law(reply.token_ids[:k]) for k in range(len(reply.token_ids))]
        assert reply.entropy == pytest.approx(-sum(p * math.log(p) for after in beginnings for p in after), abs=1e-9)
    found = torch.tensor([reply.entropy for reply in replies], dtype=torch.double)
    assert abs(found.mean().item() - entropy) < 4 * found.std().item() / math.sqrt(len(found))
    assert found.std() < torch.tensor([reply.logp for reply in replies]).std()


@pytest.mark.parametrize("tau", [1.5, 0.6, 3.0])
def test_of_whole_replies(model: Any, next_law: Any, tau: float) -> None:
    own_law = enumerated(next_law, own)
    z = sum(p ** (1 / tau) for p in own_law.values())
    exact = {reply: p ** (1 / tau) / z for reply, p in own_law.items()}
    of_tokens = enumerated(next_law, lambda law: [p ** (1 / tau) for p in law])
    assert sum(abs(exact[reply] - of_tokens[reply]) for reply in exact) > 0.02  # another law than that
    tempering = Tempering(tau, num_particles=10_000, num_runs=2, resample_below=0.95)
    found = draw_tempered(model, PROMPT, 3000, tempering, eos_token_ids={EOS}, max_new_tokens=MOST, seed=3)
    check(found.replies, exact, own_law)
    assert found.log_z == pytest.approx(math.log(z), abs=0.02)
    assert found.log_z_spread < 0.05 and found.is_usable


@pytest.mark.parametrize("resample_below", [0.0, 0.98])
def test_the_estimate_of_z_is_unbiased_with_few_particles(model: Any, next_law: Any, resample_below: float) -> None:
    """Four particles and many runs: the mean of their Z, not of their log Z, is Z."""
    tau, runs = 2.0, 6000
    z = sum(p ** (1 / tau) for p in enumerated(next_law, own).values())
    tempering = Tempering(tau, num_particles=4, num_runs=runs, resample_below=resample_below)
    found = draw_tempered(model, PROMPT, 4, tempering, eos_token_ids={EOS}, max_new_tokens=MOST, seed=1)
    assert abs(math.exp(found.log_z) / z - 1) < 4 * found.log_z_spread / math.sqrt(runs)
    assert (found.ancestors < 1) == (resample_below > 0)


def test_at_temperature_1_nothing_is_weighted(model: Any) -> None:
    found = draw_tempered(model, PROMPT, 8, Tempering(1.0), eos_token_ids={EOS}, max_new_tokens=MOST)
    assert (found.ancestors, found.effective) == (1.0, pytest.approx(1.0))
    assert (found.log_z, found.log_z_spread) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_copies_of_a_reply_are_one(model: Any) -> None:
    found = draw_tempered(model, PROMPT, 32, Tempering(0.02), eos_token_ids={EOS}, max_new_tokens=MOST)
    assert found.distinct == len({reply.token_ids for reply in found.replies}) < 8


def test_the_effective_size_counts_runs_by_their_z(model: Any) -> None:
    """Resampled at every step, particles of a run weigh the same, and two runs as Z1 to Z2."""
    tempering = Tempering(3.0, num_particles=4, num_runs=2, resample_below=1.0)
    found = draw_tempered(model, PROMPT, 8, tempering, eos_token_ids={EOS}, max_new_tokens=MOST)
    first = 1 / (1 + math.exp(-found.log_z_spread * math.sqrt(2)))  # the spread of two is their distance / sqrt(2)
    assert 0.5 < found.effective < 0.999
    assert found.effective == pytest.approx(1 / (2 * (first**2 + (1 - first) ** 2)))


def test_a_seed_gives_the_same_and_another_others(model: Any) -> None:
    options: dict[str, Any] = {"eos_token_ids": {EOS}, "max_new_tokens": MOST}
    one, two, three = (draw_tempered(model, PROMPT, 30, Tempering(1.5), seed=s, **options) for s in (1, 1, 2))
    assert one == two and one.replies != three.replies


def test_systematic_resampling_takes_each_as_often_as_its_weight_says() -> None:
    weights = torch.rand(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = systematic(weights, uniform, 20)
    counts = torch.stack([torch.bincount(row, minlength=7) for row in chosen])
    assert ((counts - 20 * weights).abs() < 1).all()
    assert counts.double().mean(0).sub(20 * weights.mean(0)).abs().max() < 0.3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"global_temperature": 0.0}, "global_temperature must be a finite number"),
        ({"global_temperature": 1.2, "num_runs": 1}, "num_particles and num_runs must be 2 or more"),
        ({"global_temperature": 1.2, "resample_below": 1.5}, "resample_below is a share"),
    ],
)
def test_what_is_no_tempering(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tempering(**settings)
