"""Random models of many families, small enough to build in a test, and an independent way to score with them.

The weights are large, so that wrong attention or wrong positions move log-probabilities by whole nats.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spl.data.collate import EncodedExample

VOCABULARY = 37
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "llama_tied": ("LlamaConfig", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "mistral_window_4": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}),
    "gemma2_window_4": (
        "Gemma2Config",
        _LLAMA_LIKE
        | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    ),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "gpt_neox": (
        "GPTNeoXConfig",
        _SPECIAL
        | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2Config",
        _SPECIAL
        | {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "mixtral": ("MixtralConfig", _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 4.0}),
    "cohere": ("CohereConfig", _LLAMA_LIKE | {"logit_scale": 0.25}),
    "mamba": ("MambaConfig", _SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "gpt_oss": (
        "GptOssConfig",
        _LLAMA_LIKE | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
}
FAMILIES = [name for name in _SETTINGS if name not in ("mamba", "gpt_oss")]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model, in evaluation mode."""
    kind, settings = _SETTINGS[name]
    config = getattr(transformers, kind)(**settings | changes)
    # The grouped kernel of a mixture of experts takes no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **experts).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def unpadded_logps(model: Any, examples: list[EncodedExample]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and entropy of each scored token, one call of the model for each whole sequence."""
    logps, entropies = [], []
    for example in examples:
        for sequence, start in zip(example.sequences, example.starts, strict=True):
            logits = model(input_ids=torch.tensor([sequence])).logits[0].to(torch.float64)
            laws = logits.log_softmax(-1)
            scored = range(start, len(sequence))
            logps.append(torch.stack([laws[t - 1, sequence[t]] for t in scored]))
            entropies.append(torch.stack([-(laws[t - 1].exp() * laws[t - 1]).sum() for t in scored]).detach())
    return logps, entropies


def example(prompt: list[int], *responses: list[int]) -> EncodedExample:
    """An example without comparisons; scoring does not look at them."""
    sequences = tuple(tuple(prompt + response) for response in responses)
    return EncodedExample(sequences, (len(prompt),) * len(responses), (), None, "")


# Responses that begin alike, one the beginning of another, of one token, and repeated; longer than a window of 4.
EXAMPLES = [
    example([1, 5, 6, 7, 8, 9], [10, 11, 12, 13, 2], [10, 11], [10, 11, 14, 15, 16, 17, 2], [20, 2]),
    example([1, 5, 6], [7], [8], [7]),
    example([1, 5, 6, 30, 31], [32, 33, 34, 35, 36, 2], [32, 33, 34, 35, 3, 2]),
]


class KeepFloat64(TorchFunctionMode):
    """transformers takes norms and eager attention's softmax in float32 whatever the dtype; in here float64 stays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and any(x is torch.float32 for x in args)):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func in (Tensor.matmul, Tensor.__matmul__):  # of what came as float64 and what was made float32
                args = (args[0], args[1].to(torch.float64))
        return func(*args, **kwargs)


def checkpoint_activations(model: Any) -> None:
    """Compute activations again in backward; transformers 5.24 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
