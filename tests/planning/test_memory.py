"""The estimate of a step's memory against the bytes that real steps hold."""

from typing import Any

import pytest
import torch
import transformers
from held import held_by, random_pairs
from transformers import AutoModelForCausalLM

from spl.logprobs.lora import FusedLinear
from spl.models import load_policy
from spl.modules.memory import Setup, peak_memory
from spl.modules.preference import PreferenceModule
from spl.modules.shape import shape_of

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "tied": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": True, "vocab_size": 4096}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 100}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
    "phi3": ("Phi3Config", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# Of each family one way, of Llama all; (family, LoRA rank, checkpointing, precision).
LOW = ("bf16-mixed", "bfloat16")
CASES = [
    *(("llama", r, c, p) for r in (8, 0) for c in (False, True) for p in ("float32", *LOW)),
    ("tied", 0, True, "float32"),
    ("tied", 8, False, "bfloat16"),
    ("mistral", 8, False, "float32"),
    ("qwen2", 8, True, "bf16-mixed"),
    ("qwen3", 0, False, "bf16-mixed"),
    ("qwen3", 8, False, "float32"),
    ("phi3", 0, False, "float32"),
    ("olmo2", 8, False, "bfloat16"),
    ("gpt_neox", 0, False, "float32"),
    ("gpt_neox", 8, True, "float32"),
]


def make_module(family: str, rank: int, checkpointing: bool, precision: str) -> Any:
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    options: dict[str, Any] = {"lora_rank": rank, "gradient_checkpointing": checkpointing}
    module: Any = PreferenceModule("tiny", alpha=1.0, scorer="forest", dtype=dtype, **options)

    def load() -> Any:
        config = getattr(transformers, kind)(**sizes)
        # Experts one after the other, each by matrix products.
        experts = {"experts_implementation": "eager"} if family == "mixtral" else {}
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **experts)
        return load_policy("tiny", model=model, lora_layer=FusedLinear, **options)

    module.load_policy = load
    module.configure_model()
    return module


@pytest.mark.parametrize(("family", "rank", "checkpointing", "precision"), CASES)
def test_the_estimate_is_what_a_step_holds(family: str, rank: int, checkpointing: bool, precision: str) -> None:
    module = make_module(family, rank, checkpointing, precision)
    batch = random_pairs(512, 96, 48, 2)
    real = held_by(module, batch, precision == "bf16-mixed")
    setup = Setup(
        mixed=precision == "bf16-mixed",
        checkpointing=checkpointing,
        reference_copy=rank == 0,
        cuda=False,
    )
    memory = peak_memory(shape_of(module.policy), batch, setup)
    assert memory.weights == real.weights
    assert memory.gradients == real.gradients
    assert memory.moments == real.moments
    assert memory.reference == real.reference
    assert memory.working == pytest.approx(real.working, rel=0.15)


def test_shards_hold_their_share() -> None:
    module = make_module("llama", 0, False, "float32")
    shape, batch = shape_of(module.policy), random_pairs(512, 96, 48, 2)
    one = peak_memory(shape, batch, Setup(reference_copy=True, cuda=False))
    shards = peak_memory(shape, batch, Setup("fsdp", 8, reference_copy=True, cuda=False))
    for part in ("weights", "gradients", "moments", "reference"):
        assert getattr(shards, part) == getattr(one, part) / 8
    assert (shards.activations, shards.head, shards.layer) == (one.activations, one.head, one.layer)
    layer = sum(p.nbytes for p in module.policy.model.layers[0].parameters())
    root = one.weights - 3 * layer  # there are three
    assert shards.gathered == root + 3 * layer + layer  # one in use and one under way twice; and one's gradient

    summed = peak_memory(shape, batch, Setup("fsdp", 8, sums_whole=True, cuda=False))
    assert (summed.gradients, summed.gathered) == (one.gradients, shards.gathered - layer)
    offloaded = peak_memory(shape, batch, Setup("fsdp", 8, reference_copy=True, cpu_offload=True, cuda=False))
    assert (offloaded.weights, offloaded.gradients, offloaded.moments, offloaded.reference) == (0, 0, 0, 0)
    copies = peak_memory(shape, batch, Setup("ddp", 8, reference_copy=True, cuda=False))
    assert copies == one._replace(gathered=one.gradients)


def test_a_run_prints_the_estimate_of_its_own_way() -> None:
    module = make_module("llama", 0, True, "float32")
    batch = random_pairs(512, 96, 48, 2)
    setup = Setup(checkpointing=True, reference_copy=True, cuda=False)
    assert module.peak_memory(batch) == peak_memory(shape_of(module.policy), batch, setup)
