"""Models by name that need not be at hand: their architectures, as facts.

The numbers are those of the `config.json` that stands beside each model on the Hub, and `parameters` is the count that
its page publishes; `tests/planning/test_architectures.py` builds each one and counts.
"""

from typing import Any, NamedTuple

from transformers import AutoConfig


class Architecture(NamedTuple):
    """A published model."""

    source: str  # its id on the Hub
    parameters: int
    kind: str  # transformers' name of the family
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool  # the head is the embeddings

    def config(self) -> Any:
        """What transformers builds the model from."""
        return AutoConfig.for_model(
            self.kind,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            tie_word_embeddings=self.tied,
        )


ARCHITECTURES = {
    "smollm2-135m": Architecture("HuggingFaceTB/SmolLM2-135M", 134_515_008, "llama", 49152, 576, 1536, 30, 9, 3, True),
    "smollm2-360m": Architecture("HuggingFaceTB/SmolLM2-360M", 361_821_120, "llama", 49152, 960, 2560, 32, 15, 5, True),
    "smollm2-1.7b": Architecture(
        "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, "llama", 49152, 2048, 8192, 24, 32, 32, True
    ),
    "qwen2.5-0.5b": Architecture("Qwen/Qwen2.5-0.5B", 494_032_768, "qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "llama-3.2-1b": Architecture(
        "meta-llama/Llama-3.2-1B", 1_235_814_400, "llama", 128256, 2048, 8192, 16, 32, 8, True
    ),
    "qwen2.5-1.5b": Architecture("Qwen/Qwen2.5-1.5B", 1_543_714_304, "qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": Architecture("Qwen/Qwen2.5-3B", 3_085_938_688, "qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    "llama-3.2-3b": Architecture(
        "meta-llama/Llama-3.2-3B", 3_212_749_824, "llama", 128256, 3072, 8192, 28, 24, 8, True
    ),
    "mistral-7b-v0.3": Architecture(
        "mistralai/Mistral-7B-v0.3", 7_248_023_552, "mistral", 32768, 4096, 14336, 32, 32, 8, False
    ),
    "qwen2.5-7b": Architecture("Qwen/Qwen2.5-7B", 7_615_616_512, "qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "llama-3.1-8b": Architecture(
        "meta-llama/Llama-3.1-8B", 8_030_261_248, "llama", 128256, 4096, 14336, 32, 32, 8, False
    ),
    "qwen2.5-14b": Architecture("Qwen/Qwen2.5-14B", 14_770_033_664, "qwen2", 152064, 5120, 13824, 48, 40, 8, False),
    "qwen2.5-32b": Architecture("Qwen/Qwen2.5-32B", 32_763_876_352, "qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "llama-3.1-70b": Architecture(
        "meta-llama/Llama-3.1-70B", 70_553_706_496, "llama", 128256, 8192, 28672, 80, 64, 8, False
    ),
    "qwen2.5-72b": Architecture("Qwen/Qwen2.5-72B", 72_706_203_648, "qwen2", 152064, 8192, 29568, 80, 64, 8, False),
}

# From small to large, for the table of how time grows.
GROWTH = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b")
