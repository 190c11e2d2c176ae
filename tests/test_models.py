"""Loading and saving, against transformers and peft themselves."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import spl.models
from spl.models import fingerprint, frozen_copy, load_model, load_policy, load_tokenizer, save_policy
from spl.types import UserError

IDS = torch.arange(30)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def moved(policy: torch.nn.Module) -> torch.nn.Module:
    """As if trained: every trainable weight off its start."""
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return policy


def test_fresh_adapters_change_nothing_and_alone_train() -> None:
    policy = load_policy("tiny", lora_rank=4)
    assert torch.equal(logits(policy), logits(load_model("tiny")))
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_rank_zero_trains_everything() -> None:
    assert all(p.requires_grad for p in load_policy("tiny", lora_rank=0).parameters())


def test_a_merged_export_loads_with_transformers(tmp_path: Path, tiny_tokenizer) -> None:
    policy = moved(load_policy("tiny", lora_rank=4))
    gap = save_policy(policy, tiny_tokenizer, tmp_path, "merged", IDS)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(again) - logits(policy)).abs().max() < 1e-4
    assert gap < 1e-4
    assert not torch.allclose(logits(again), logits(load_model("tiny")), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path)("hé<|end|>")["input_ids"] == tiny_tokenizer("hé<|end|>")["input_ids"]
    assert list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob("*.bin"))


def test_an_adapter_export_loads_with_peft_and_is_merged_as_a_starting_policy(tmp_path: Path, tiny_tokenizer) -> None:
    policy = moved(load_policy("tiny", lora_rank=4))
    save_policy(policy, tiny_tokenizer, tmp_path, "adapter", IDS)
    assert (logits(PeftModel.from_pretrained(load_model("tiny"), tmp_path)) - logits(policy)).abs().max() < 1e-5
    # Trained further, its reference is the adapted model, not the base below it.
    further = load_policy(str(tmp_path), lora_rank=4)
    with further.disable_adapter():
        assert (logits(further) - logits(policy)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_that_differs_is_not_called_done(tmp_path: Path, tiny_tokenizer, monkeypatch, dtype) -> None:
    policy = moved(load_policy("tiny", lora_rank=4, dtype=dtype))
    monkeypatch.setattr(spl.models.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: load_model("tiny"))
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        save_policy(policy, tiny_tokenizer, tmp_path, "merged", IDS)


def test_an_adapter_of_a_fully_trained_model_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="all weights were trained"):
        save_policy(load_policy("tiny", lora_rank=0), tiny_tokenizer, tmp_path, "adapter", IDS)


def test_dropout_is_off_in_training_mode(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    noisy = GPT2LMHeadModel(config).train()
    assert not torch.equal(logits(noisy), logits(noisy))
    noisy.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), lora_rank=0)
    assert policy.training
    assert torch.equal(logits(policy), logits(policy))


def test_a_frozen_copy_stays_behind() -> None:
    policy = load_policy("tiny", lora_rank=0)
    copy = frozen_copy(policy)
    before = logits(copy)
    moved(policy)
    assert torch.equal(logits(copy), before)
    assert not any(p.requires_grad for p in copy.parameters())


def test_one_starting_policy_has_one_fingerprint(tmp_path: Path) -> None:
    start = fingerprint(load_model("tiny"))
    load_model("tiny").save_pretrained(tmp_path)
    for name in ("tiny", str(tmp_path)):
        for rank in (0, 4, 8):
            policy = load_policy(name, lora_rank=rank, gradient_checkpointing=rank == 8)
            assert fingerprint(policy) == fingerprint(frozen_copy(policy)) == start
    policy = load_policy("tiny", lora_rank=4, lora_alpha=8, lora_targets=["q_proj", "down_proj"])
    assert not torch.equal(logits(policy), logits(moved(policy)))
    assert fingerprint(policy) == start
    assert fingerprint(moved(load_policy("tiny", lora_rank=0))) != start


def test_a_policy_after_an_adapter_has_a_fingerprint_of_its_own(tmp_path: Path, tiny_tokenizer) -> None:
    save_policy(moved(load_policy("tiny", lora_rank=4)), tiny_tokenizer, tmp_path, "adapter", IDS)
    further = [fingerprint(load_policy(str(tmp_path), lora_rank=rank)) for rank in (4, 0)]
    assert further[0] == further[1] != fingerprint(load_policy("tiny"))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp.down_proj", "model.norm"])
def test_one_bit_of_a_weight_makes_another_fingerprint(name: str, rank: int) -> None:
    policy = load_policy("tiny", lora_rank=rank)
    before = fingerprint(policy)
    weight = next(p for n, p in policy.named_parameters() if name in n and "lora_" not in n)
    weight.data.view(torch.int32).view(-1)[-1] ^= 1
    assert fingerprint(policy) != before
    weight.data.view(torch.int32).view(-1)[-1] ^= 1
    assert fingerprint(policy) == before


def test_a_dtype_makes_another_fingerprint() -> None:
    half = load_policy("tiny", dtype="bfloat16")
    found = [fingerprint(half), fingerprint(half.float()), fingerprint(load_policy("tiny"))]
    assert len(set(found)) == 3
    policy = load_policy("tiny", dtype="bfloat16")
    before, weight = fingerprint(policy), next(policy.parameters())
    weight.data = weight.data.view(torch.float16)  # the same bytes
    assert fingerprint(policy) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["rope_parameters"].update(rope_theta=5e5),
        lambda config: config.update(rms_norm_eps=1e-5),
        lambda config: config.update(num_attention_heads=2, num_key_value_heads=1, head_dim=32),
    ],
    ids=["rope_theta", "rms_norm_eps", "heads"],
)
def test_a_config_makes_another_fingerprint(tmp_path: Path, change: Callable[[dict], None]) -> None:
    model = load_model("tiny")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    other = load_model(str(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.allclose(logits(other), logits(model), atol=1e-6)
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nobody/nothing", "cannot load 'nobody/nothing'"),
        ("nowhere.gguf", "no file 'nowhere.gguf'"),
        ("no_such_package/model.gguf", "no file 'no_such_package/model.gguf'"),
    ],
)
def test_a_model_that_is_not_there(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_policy(name)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = load_model("tiny")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        load_model(str(tmp_path))


def test_the_tiny_tokenizer_reads_any_bytes() -> None:
    tokenizer = load_tokenizer("tiny")
    text = "Ünïcode 🎉\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|bos|><|user|>hi<|end|><|assistant|>"


def test_the_tiny_model_is_the_same_each_time_and_near_uniform() -> None:
    torch.manual_seed(5)
    first = logits(load_model("tiny"))
    torch.manual_seed(6)
    assert torch.equal(first, logits(load_model("tiny")))
    entropy = torch.distributions.Categorical(logits=first).entropy()
    assert entropy.min() > 0.9 * math.log(first.shape[-1])
