"""Rows that part and end, with a prompt's keys and values once, against the whole text through the model every time."""

from inspect import signature
from typing import Any

import pytest
import torch
import transformers

from spl.models import load_policy
from spl.sampling import decoder as decoders
from spl.sampling.decoder import PlainDecoder, SharedDecoder, UnmaskedDecoder, WholeDecoder, decoder, takes_padding

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral, window 4": ("MistralConfig", GROUPED | {"sliding_window": 4}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma2, soft-caps, window 4": (
        "Gemma2Config",
        GROUPED | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    ),
    "phi3": ("Phi3Config", GROUPED),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention sinks": ("GptOssConfig", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "recurrent layers": (
        "FalconH1Config",
        GROUPED | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "convolutions": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]
# For each step the reply's row as a string of its tokens, so that equal beginnings are one row.
STEPS = [[20, 20, 21, 20, 20, 22], [23, 23, 23, 24, 25, 26], [27, 28, 27, 27, 28, 29], [30, 30, 30, 30, 31, 30]]
PROMPT_OF = [0, 0, 0, 1, 1, 2]


def build(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    special = {"vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, kind)(**{"max_position_embeddings": 64} | settings | special)
    # Gemma 2's soft-caps are passed over by the sdpa that some versions of transformers take for it.
    way = "eager" if kind == "Gemma2Config" else None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=way).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def check(model: Any, one: decoders.Decoder) -> list[int]:
    """Step through STEPS, the third reply ending after two of them; the number of rows at each step."""
    texts, live = [list(PROMPTS[k]) for k in PROMPT_OF], list(range(6))
    rows, sizes = torch.tensor(PROMPT_OF), []
    for number, tokens in enumerate([None, *STEPS]):
        if tokens is not None:
            if number == 3:
                live.remove(2)
                rows = torch.cat([rows[:2], rows[3:]])
            rows = one.advance(rows, torch.tensor([tokens[k] for k in live]))
            for k in live:
                texts[k].append(tokens[k])
        expected = [model(input_ids=torch.tensor([texts[k]])).logits[0, -1] for k in live]
        torch.testing.assert_close(one.logits[rows], torch.stack(expected), atol=2e-4, rtol=1e-4)
        sizes.append(len(one.logits))
    return sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_both_decoders_give_the_models_laws(name: str) -> None:
    model = build(*FAMILIES[name])
    assert check(model, SharedDecoder(model, PROMPTS)) == [3, 4, 5, 5, 5]
    assert check(model, PlainDecoder(model, PROMPTS)) == [3, 4, 5, 5, 5]
    assert isinstance(decoder(model, PROMPTS), SharedDecoder)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_attends_otherwise_is_found_out(name: str) -> None:
    model = build(*OTHERS[name])
    one = decoder(model, PROMPTS)
    assert isinstance(one, PlainDecoder)
    check(model, one)


@torch.no_grad()
@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_half_precision_is_no_reason_to_go_without_a_cache(name: str, way: str) -> None:
    model = build(*FAMILIES[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert isinstance(decoder(model.bfloat16() if way == "weights" else model, PROMPTS), SharedDecoder)


@torch.no_grad()
def test_a_model_is_tried_within_its_positions() -> None:
    model = build("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "max_position_embeddings": 12})
    check(model, decoder(model, PROMPTS))
    assert isinstance(decoder(build("GPT2Config", FAMILIES["gpt2"][1]), [[5] * 9]), SharedDecoder)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("MambaConfig", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, UnmaskedDecoder),
        (
            "RecurrentGemmaConfig",
            SIZES | {"lru_width": 16, "attention_window_size": 6, "num_hidden_layers": 3},
            WholeDecoder,  # its state is in its layers, where rows cannot be put in another order
        ),
    ],
)
def test_models_that_read_padding_take_a_prompt_at_a_time(kind: str, settings: Any, expected: type) -> None:
    model = build(kind, settings)
    assert not takes_padding(model, PROMPTS)
    one = decoder(model, PROMPTS[:1])
    # Before transformers 5.24 Mamba's cache is none that rows can be put in another order in.
    cached = "cache" in signature(model.forward).parameters
    assert type(one) is (expected if cached else WholeDecoder)
    texts, rows = [list(PROMPTS[0]) for _ in range(2)], torch.tensor([0, 0])
    for tokens in ([20, 21], [22, 22], [23, 24], [25, 26], [27, 27]):
        rows = one.advance(rows, torch.tensor(tokens))
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        exact = torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
        torch.testing.assert_close(one.logits[rows], exact, atol=2e-4, rtol=1e-4)


def test_the_models_own_attention_comes_back() -> None:
    model = build(*FAMILIES["llama"])
    before = model.config._attn_implementation
    decoder(model, PROMPTS)
    assert model.config._attn_implementation == before


def test_half_precision_is_near() -> None:
    model = build(*FAMILIES["llama"]).bfloat16()
    fast, plain = SharedDecoder(model, PROMPTS), PlainDecoder(model, PROMPTS)
    assert fast.logits.dtype == torch.bfloat16
    torch.testing.assert_close(fast.logits, plain.logits, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("parents", "places", "moved"),
    [
        ([0, 1, 2], [0, 1, 2], []),
        ([0, 0, 1, 1], [0, 2, 1, 3], [(2, 0), (3, 1)]),
        ([2, 3], [0, 1], [(0, 2), (1, 3)]),
        ([1, 3, 3], [1, 0, 2], [(0, 3), (2, 3)]),
    ],
)
def test_few_rows_move_and_none_over_one_that_is_needed(
    parents: list[int], places: list[int], moved: list[Any]
) -> None:
    found = decoders._places(parents)
    assert found == (places, moved)
    assert not {place for place, _ in moved} & {parent for parent in parents if parent not in places}


@torch.no_grad()
def test_adapters_are_part_of_the_law() -> None:
    model = load_policy("tiny", lora_rank=2).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    one = decoder(model, PROMPTS)
    assert isinstance(one, SharedDecoder)
    check(model, one)


@torch.no_grad()
def test_a_window_that_only_the_mask_tells_of() -> None:
    """Longer than what a decoder is tried on, so that there the laws are the same."""
    sizes = GROUPED | {"max_position_embeddings": 128, "num_local_experts": 2, "sliding_window": 70}
    model = build("PhimoeConfig", sizes)
    prompt = [3 + k % 30 for k in range(100)]
    logits = decoder(model, [prompt]).logits[0]
    torch.testing.assert_close(logits, model(input_ids=torch.tensor([prompt])).logits[0, -1], atol=2e-4, rtol=1e-4)
