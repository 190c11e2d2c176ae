"""Samples, against the model's own probabilities."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from spl.data.prompts import reply_batch
from spl.logprobs.sequence import sequence_logps
from spl.models import load_model
from spl.sampling.generate import Laws, draw, sample
from spl.sampling.logits import Decoding
from spl.types import Prompt


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A tiny model whose next-token law is far from uniform."""
    torch.manual_seed(0)
    model = load_model("tiny").double().eval()
    for p in model.parameters():
        p.data *= 3
    return model


PROMPT = [256, 260, 71, 102]
LONGER = [256, 260, 71, 102, 90, 91, 92, 261]


def replies_to(model: torch.nn.Module, num: int, *, eos: int = 257, seed: int = 0, **options: Any) -> list[Any]:
    """Replies to the one prompt."""
    return sample(model, [PROMPT], num, eos_token_ids={eos}, seeds=[seed], **options)[0]


def law_after(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)


def test_first_tokens_follow_the_model(model: torch.nn.Module) -> None:
    n = 4000
    law = law_after(model, PROMPT)
    counts = Counter(r[0] for r in replies_to(model, n, max_new_tokens=1))
    for token in law.topk(5).indices.tolist():
        p = law[token].item()
        assert abs(counts[token] / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_later_tokens_follow_the_model_given_the_earlier(model: torch.nn.Module) -> None:
    n = 6000
    replies = replies_to(model, n, max_new_tokens=2, seed=3)
    first = Counter(r[0] for r in replies).most_common(1)[0][0]
    after = [r[1] for r in replies if r[0] == first and len(r) > 1]
    law = law_after(model, [*PROMPT, first])
    token = int(law.argmax())
    p = law[token].item()
    assert len(after) > 100
    assert abs(after.count(token) / len(after) - p) < 4 * math.sqrt(p * (1 - p) / len(after))


def test_a_reply_ends_with_its_first_eos(model: torch.nn.Module) -> None:
    likely = int(law_after(model, PROMPT).argmax())
    replies = replies_to(model, 200, eos=likely, max_new_tokens=6)
    assert any(len(r) < 6 for r in replies)
    for reply in replies:
        assert likely not in reply[:-1]
        assert len(reply) == 6 or reply[-1] == likely


def test_a_seed_gives_the_same_replies_and_another_others(model: torch.nn.Module) -> None:
    one, two, three = (replies_to(model, 8, max_new_tokens=5, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one != three


def test_a_date_may_be_a_seed(model: torch.nn.Module) -> None:
    """In `spl sample` a prompt's seed is the run's times 1,000,003, and so is a reply's of its prompt's."""
    one, two = (replies_to(model, 8, max_new_tokens=5, seed=s * 1_000_003) for s in (20_261_126, 20_261_127))
    assert one != two


def test_low_temperature_is_greedy(model: torch.nn.Module) -> None:
    best = int(law_after(model, PROMPT).argmax())
    assert {r[0] for r in replies_to(model, 50, max_new_tokens=1, temperature=1e-4)} == {best}


def test_a_reply_does_not_depend_on_what_else_is_in_the_batch(model: torch.nn.Module) -> None:
    options: dict[str, Any] = {"eos_token_ids": {257}, "max_new_tokens": 12}
    both = sample(model, [LONGER, PROMPT], 5, seeds=[8, 9], **options)
    alone = [sample(model, [prompt], 5, seeds=[seed], **options)[0] for prompt, seed in ((LONGER, 8), (PROMPT, 9))]
    assert both == alone
    more = sample(model, [LONGER, PROMPT], 7, seeds=[8, 9], **options)
    assert [replies[:5] for replies in more] == both


def step_by_step(model: torch.nn.Module, prompt: list[int], seed: int, num: int, eos: int, length: int) -> list[Any]:
    """The same draws without a cache or a batch: the whole text through the model for every token."""
    replies = []
    for k in range(num):
        uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + k), dtype=torch.float64)
        reply: list[int] = []
        while len(reply) < length and eos not in reply:
            law = law_after(model, [*prompt, *reply])
            reply.append(int((law.cumsum(-1) <= uniform[len(reply)] * law.sum()).sum()))
        replies.append(tuple(reply))
    return replies


def test_equals_one_reply_at_a_time_without_a_cache(model: torch.nn.Module) -> None:
    """Many ended replies leave the batch on the way, and the prompts are of different length."""
    eos = int(law_after(model, PROMPT).argmax())
    found = sample(model, [LONGER, PROMPT], 12, eos_token_ids={eos}, max_new_tokens=80, seeds=[3, 4])
    assert found == [step_by_step(model, p, s, 12, eos, 80) for p, s in ((LONGER, 3), (PROMPT, 4))]
    lengths = {len(reply) for replies in found for reply in replies}
    assert 1 in lengths and max(lengths) > 64  # beyond what a cache has room for at first


def test_any_of_several_tokens_ends_a_reply(model: torch.nn.Module) -> None:
    ends = set(law_after(model, PROMPT).topk(3).indices.tolist())
    replies = sample(model, [PROMPT], 60, eos_token_ids=ends, max_new_tokens=20)[0]
    assert len({reply[-1] for reply in replies} & ends) > 1
    assert not any(token in ends for reply in replies for token in reply[:-1])


@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma2Config", "GPT2Config", "MambaConfig", "RecurrentGemmaConfig"])
def test_other_families_sliding_windows_and_recurrent_layers(kind: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "MistralConfig": sizes | {"num_key_value_heads": 1, "sliding_window": 6},
        "Gemma2Config": sizes | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6},
        "GPT2Config": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        # Two whose recurrent layers read padding.
        "MambaConfig": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        "RecurrentGemmaConfig": sizes | {"lru_width": 16, "attention_window_size": 6, "num_hidden_layers": 3},
    }[kind]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    # transformers' own attention for Gemma 2 gives NaN where a padded token sees nothing, in float64 alone.
    dtype = torch.float32 if kind == "Gemma2Config" else torch.float64
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for p in model.parameters():
        p.data *= 2
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    found = sample(model, prompts, 6, eos_token_ids={2}, max_new_tokens=15, seeds=[0, 1])
    assert found == [step_by_step(model, p, s, 6, 2, 15) for p, s in zip(prompts, (0, 1), strict=True)]


def test_what_a_reply_says_of_itself_is_what_scoring_says(model: torch.nn.Module) -> None:
    """Log-probabilities and entropies at temperature 1, EOS among them, whatever a reply was drawn from."""
    eos = int(law_after(model, PROMPT).topk(2).indices[1])
    for decoding in (Decoding(), Decoding(1.7, top_k=40), Decoding(0)):
        drawn = draw(model, [LONGER, PROMPT], 6, eos_token_ids={eos}, max_new_tokens=9, decoding=decoding, seeds=[1, 2])
        prompts = [Prompt("", tuple(LONGER)), Prompt("", tuple(PROMPT))]
        scored = sequence_logps(model, reply_batch(prompts, [[r.token_ids for r in replies] for replies in drawn]))
        replies = [reply for replies in drawn for reply in replies]
        torch.testing.assert_close(torch.tensor([r.logp for r in replies]).double(), scored.logps.detach().double())
        torch.testing.assert_close(torch.tensor([r.entropy for r in replies]).double(), scored.entropies.double())
        assert scored.num_tokens.tolist() == [len(r.token_ids) for r in replies]
        assert [r.ended for r in replies] == [r.token_ids[-1] == eos for r in replies]


def test_entropies_are_those_of_the_laws() -> None:
    """Of flat, sharp and barred ones, by torch's own distribution."""
    logits = (
        torch.randn(6, 700, generator=torch.Generator().manual_seed(0)) * torch.tensor([0, 0.1, 1, 3, 30, 3])[:, None]
    )
    logits[5, 100:] = -torch.inf
    expected = torch.distributions.Categorical(logits=logits[:5].double()).entropy().tolist()
    expected.append(torch.distributions.Categorical(logits=logits[5, :100].double()).entropy().item())
    assert Laws(logits, Decoding()).entropies.tolist() == pytest.approx(expected, abs=2e-5)


def test_a_model_that_gives_no_numbers_is_no_law(model: torch.nn.Module) -> None:
    broken = load_model("tiny").eval()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        replies_to(broken, 2, max_new_tokens=2)
