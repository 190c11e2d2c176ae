"""What memory and traffic depend on in a model, read from it once; its weights may be sharded or have no content."""

from typing import Any, NamedTuple

from torch import nn

from spl.logprobs.score import base_of


class Shape(NamedTuple):
    """What a model's memory depends on: numbers a token, counts of parameters and their bytes."""

    layers: int
    hidden: int
    inner: int  # of the feed-forward part, of all experts that a token sees
    query: int  # heads times their width
    key: int  # and of keys, or of values
    heads: int
    vocabulary: int
    inputs: int  # of all matrices of a layer
    norms: int  # that the norms of a layer keep
    gated: bool  # the feed-forward part
    ranks: int  # of a layer's adapters together
    total: int  # parameters
    trained: int
    total_bytes: int
    trained_bytes: int
    layer_bytes: int  # of the largest decoder layer, which is gathered at once where layers are sharded
    root_bytes: int  # of all that is in no layer
    tied: bool  # the head is the embeddings

    @property
    def adapters(self) -> bool:
        return self.ranks > 0

    @property
    def low(self) -> bool:
        """Whether the weights are in half the size."""
        return 2 * self.total_bytes < 3 * 2 * self.total


def shape_of(model: nn.Module) -> Shape:
    """Read a model's shape; its weights may be sharded, or have no content at all (on the meta device)."""
    base = base_of(model)
    config: Any = base.config.get_text_config()
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = config.num_attention_heads * width
    key = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
    layer = decoder_layers(model)[0]
    named = list(layer.named_parameters())
    matrices = {name: p for name, p in named if p.ndim == 2 and ".lora_" not in name}
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layer_bytes = [sum(p.numel() * p.element_size() for p in one.parameters()) for one in decoder_layers(model)]
    total_bytes = sum(p.numel() * p.element_size() for p in parameters)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return Shape(
        layers=len(layer_bytes),
        hidden=config.hidden_size,
        inner=inner * (getattr(config, "num_experts_per_tok", None) or 1),
        query=query,
        key=key,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        inputs=sum(_input_width(layer, name, p) for name, p in matrices.items()),
        norms=sum(_kept_by_norm(name, m, config.hidden_size, query, key) for name, m in layer.named_modules()),
        gated=any("gate" in name for name in matrices),
        ranks=sum(p.shape[0] for name, p in named if ".lora_A." in name),
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        total_bytes=total_bytes,
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        layer_bytes=max(layer_bytes),
        root_bytes=total_bytes - sum(layer_bytes),
        tied=base.get_output_embeddings().weight is base.get_input_embeddings().weight,
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal language model, which FSDP2 gathers one at a time."""
    base = base_of(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = (m for m in base.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists))


def _input_width(layer: nn.Module, name: str, weight: nn.Parameter) -> int:
    transposed = type(layer.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"  # of GPT-2
    return int(weight.shape[0 if transposed else 1])


def _kept_by_norm(name: str, module: nn.Module, hidden: int, query: int, key: int) -> int:
    """Numbers a token that a norm keeps: its input and, where transformers' own has a weight to train, its result."""
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or weight is None:
        return 0
    width = {"q_norm": query, "k_norm": key}.get(name.rpartition(".")[2], hidden)
    return width * (2 if weight.requires_grad and not isinstance(module, nn.LayerNorm) else 1)
