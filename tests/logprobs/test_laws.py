"""The laws along responses, against the plain definition and against the enumeration of every reply."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spl.data.collate import EncodedExample, collate
from spl.logprobs.laws import score_laws
from spl.logprobs.score import prepare, score
from spl.metrics.entropy import PromptMean
from spl.sampling.generate import sample
from spl.types import PreferenceBatch

VOCABULARY, EOS, LENGTH = 6, 2, 4
PROMPTS = [(1, 3, 4), (1, 5)]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=EOS, **sizes)).double()
    for p in model.parameters():
        p.data *= 8 if p.ndim > 1 else 1
    return model.eval()


POLICY, REFERENCE = tiny(0), tiny(1)


@contextmanager
def as_reference() -> Iterator[nn.Module]:
    prepare(REFERENCE, "forest")
    yield REFERENCE


def batch_of(prompts: list[tuple[int, ...]], replies: list[list[tuple[int, ...]]]) -> PreferenceBatch:
    return collate(
        [
            EncodedExample(tuple(p + r for r in own), (len(p),) * len(own), (), None, "")
            for p, own in zip(prompts, replies, strict=True)
        ]
    )


def every_reply() -> list[tuple[int, ...]]:
    """All replies of at most LENGTH tokens: those that end, and those that are cut."""
    open_replies: list[tuple[int, ...]] = [()]
    ended: list[tuple[int, ...]] = []
    for _ in range(LENGTH):
        longer = [(*r, t) for r, t in itertools.product(open_replies, range(VOCABULARY))]
        ended += [r for r in longer if r[-1] == EOS]
        open_replies = [r for r in longer if r[-1] != EOS]
    return ended + open_replies


@torch.no_grad()
def log_laws(model: nn.Module, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
    """log p(. | prefix) at every position of a reply [n, V], by an ordinary forward pass."""
    prepare(model, "plain")
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def sum_log_p(model: nn.Module, prompt: tuple[int, ...], reply: tuple[int, ...]) -> float:
    laws = log_laws(model, prompt, reply)
    return float(laws[torch.arange(len(reply)), list(reply)].sum())


@pytest.fixture(scope="module")
def enumerated() -> dict[str, list[float]]:
    """Exact entropy, cross-entropy and mean length of each prompt's replies, from the probability of every reply."""
    found: dict[str, list[float]] = {"entropy": [], "cross_entropy": [], "length": []}
    for prompt in PROMPTS:
        replies = every_reply()
        log_p = torch.tensor([sum_log_p(POLICY, prompt, r) for r in replies], dtype=torch.float64)
        log_q = torch.tensor([sum_log_p(REFERENCE, prompt, r) for r in replies], dtype=torch.float64)
        p = log_p.exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-9)
        found["entropy"].append(float(-(p * log_p).sum()))
        found["cross_entropy"].append(float(-(p * log_q).sum()))
        found["length"].append(float((p * torch.tensor([len(r) for r in replies])).sum()))
    return found


REPLIES = [[(3, 4, EOS), (3, 4, 5, 5), (EOS,), (3, 4, EOS)], [(0, 0), (5, EOS)]]


@pytest.mark.parametrize("scorer", ["forest", "plain"])
def test_each_entry_by_hand(scorer: str) -> None:
    temperature = 1.7
    prepare(POLICY, scorer)
    batch = batch_of(PROMPTS, REPLIES)
    laws = score_laws(POLICY, as_reference, batch, scorer, chunk=2, global_temperature=temperature)
    pairs = [(prompt, reply) for prompt, own in zip(PROMPTS, REPLIES, strict=True) for reply in own]
    for k, (prompt, reply) in enumerate(pairs):
        log_p, log_q = log_laws(POLICY, prompt, reply), log_laws(REFERENCE, prompt, reply)
        # Renyi entropy of order 1 / temperature: log Z_t = (1 - 1/temperature) H_{1/temperature}.
        order = 1 / temperature
        renyi = (log_q.exp() ** order).sum(-1).log() / (1 - order)
        expected = {
            "logps": sum_log_p(POLICY, prompt, reply),
            "reference_logps": sum_log_p(REFERENCE, prompt, reply),
            "entropies": float(torch.distributions.Categorical(logits=log_p).entropy().sum()),
            "cross_entropies": float(-(log_p.exp() * log_q).sum()),
            "log_normalizers": float((1 - order) * renyi.sum()),
            "num_tokens": len(reply),
        }
        for name, value in expected.items():
            assert float(getattr(laws, name)[k]) == pytest.approx(value, abs=2e-4), name


def test_against_the_scoring_pass() -> None:
    prepare(POLICY, "forest")
    batch = batch_of(PROMPTS, REPLIES)
    laws, scored = score_laws(POLICY, as_reference, batch), score(POLICY, batch)
    torch.testing.assert_close(laws.logps, scored.logps.detach())
    torch.testing.assert_close(laws.entropies, scored.entropies)


def test_the_policy_as_its_own_reference() -> None:
    prepare(POLICY, "forest")
    laws = score_laws(POLICY, None, batch_of(PROMPTS, REPLIES))
    assert torch.equal(laws.cross_entropies, laws.entropies)
    assert torch.equal(laws.reference_logps, laws.logps)
    assert laws.log_normalizers.isnan().all()


def test_the_global_temperature_itself() -> None:
    """p^(1/tau) / Z over whole replies = token temperature tau, times the product of Z_t, renormalised."""
    tau, prompt, replies = 1.4, PROMPTS[0], every_reply()
    prepare(REFERENCE, "forest")
    laws = score_laws(REFERENCE, None, batch_of([prompt], [replies]), global_temperature=tau)
    tempered = [
        float((log_laws(REFERENCE, prompt, r) / tau).log_softmax(-1)[torch.arange(len(r)), list(r)].sum())
        for r in replies
    ]
    product = torch.tensor(tempered) + laws.log_normalizers.cpu()
    exact = torch.tensor([sum_log_p(REFERENCE, prompt, r) / tau for r in replies], dtype=torch.float64)
    torch.testing.assert_close(product.softmax(0), exact.softmax(0), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["entropy", "surprisal", "cross_entropy", "cross_surprisal", "kl", "length"])
def test_estimates_on_samples_are_within_three_errors_of_the_enumeration(
    enumerated: dict[str, list[float]], name: str
) -> None:
    prepare(POLICY, "forest")
    drawn = sample(POLICY, PROMPTS, 400, eos_token_ids={EOS}, max_new_tokens=LENGTH, seeds=[5, 6])
    prepare(POLICY, "forest")
    laws = score_laws(POLICY, as_reference, batch_of(PROMPTS, drawn))
    values = {
        "entropy": laws.entropies,
        "surprisal": -laws.logps,
        "cross_entropy": laws.cross_entropies,
        "cross_surprisal": -laws.reference_logps,
        "kl": laws.cross_entropies - laws.entropies,
        "length": laws.num_tokens,
    }[name]
    mean = PromptMean()
    for own in values.float().split(400):
        mean.update(own[:, None])
    estimate, error = (float(x) for x in mean.compute())
    per_prompt = {
        "surprisal": enumerated["entropy"],
        "cross_surprisal": enumerated["cross_entropy"],
        "kl": [c - h for c, h in zip(enumerated["cross_entropy"], enumerated["entropy"], strict=True)],
    }.get(name) or enumerated[name]
    assert 0 < error < 0.1
    assert abs(estimate - sum(per_prompt) / 2) < 3 * error


def test_expectations_vary_less_than_log_probabilities() -> None:
    prepare(POLICY, "forest")
    drawn = sample(POLICY, PROMPTS[:1], 400, eos_token_ids={EOS}, max_new_tokens=LENGTH)
    laws = score_laws(POLICY, as_reference, batch_of(PROMPTS[:1], drawn))
    kl, plain = laws.cross_entropies - laws.entropies, laws.logps - laws.reference_logps
    assert kl.std() < plain.std() / 1.5
    assert (kl >= 0).all()


def test_adapters_off_is_the_reference() -> None:
    base = tiny(0)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.double().eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    prepare(model, "forest")
    batch = batch_of(PROMPTS, REPLIES)
    laws = score_laws(model, off, batch)
    prepare(POLICY, "forest")  # the same weights as the base
    expected = score_laws(POLICY, None, batch)
    torch.testing.assert_close(laws.reference_logps, expected.logps, rtol=0, atol=1e-4)
    assert (laws.logps - laws.reference_logps).abs().max() > 0.1
    assert math.isfinite(float(laws.cross_entropies.sum()))
