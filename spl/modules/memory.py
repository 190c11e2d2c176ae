"""An estimate of a training step's peak memory, printed before step 1."""

from typing import Any

from torch import nn

from spl.logprobs.score import base_of
from spl.types import PreferenceBatch


def estimate_peak_memory(
    model: nn.Module, batch: PreferenceBatch, *, head_chunk: int, checkpointing: bool, reference_copy: bool
) -> float:
    """Bytes that training on a batch needs: weights, gradients, AdamW's two moments, activations, a chunk of logits.

    Activations follow the decoder layer of Llama, about 12 hidden and 6 intermediate vectors a token and layer with
    adapters, 8 and 5 without; an estimate, good to about a third on such models.
    """
    config: Any = base_of(model).config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    frozen_copy = weights if reference_copy else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = trained < sum(p.numel() for p in model.parameters()) / 2
    size = next(model.parameters()).element_size()
    layer = (12 * hidden + 6 * inner if adapters else 8 * hidden + 5 * inner) * size * batch.num_tokens
    activations = layer + layers * hidden * size * batch.num_tokens if checkpointing else layers * layer
    chunk = min(head_chunk, batch.edge_source.numel())
    return float(weights + frozen_copy + trained * (size + 8) + activations + 3 * chunk * config.vocab_size * 4)
