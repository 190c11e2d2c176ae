"""The work that is in a training step: floating-point operations that the model asks for, whoever carries them out."""

from typing import Any, NamedTuple

from torch import nn

from spl.logprobs.score import base_of
from spl.types import PreferenceBatch


class MatrixSizes(NamedTuple):
    """What a model multiplies a token by. Constant through a run, and slow to find in a model with many modules."""

    trained: int  # numbers in the matrices that train, embeddings and head apart
    frozen: int  # and in those that do not
    head: int  # in the output embeddings
    attended: int  # layers times the width of their queries


def matrix_sizes(model: nn.Module) -> MatrixSizes:
    """Count the matrices of a model: of a mixture's experts as many as a token sees, of embeddings, looked up, none.

    Weights are told apart by identity: a sharded tensor has no address that tells it from another.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings().weight
    apart = {id(head), id(base.get_input_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim in (2, 3) and id(p) not in apart]
    seen: int = getattr(config, "num_experts_per_tok", None) or 1

    def numbers(weight: nn.Parameter) -> int:
        return weight.numel() if weight.ndim == 2 else weight.numel() // weight.shape[0] * seen

    trained = sum(numbers(p) for p in matrices if p.requires_grad)
    size: Any = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return MatrixSizes(
        trained=trained,
        frozen=sum(map(numbers, matrices)) - trained,
        head=head.numel(),
        attended=config.num_hidden_layers * config.num_attention_heads * size,
    )


def step_flops(sizes: MatrixSizes, batch: PreferenceBatch, reference: bool = True) -> float:
    """Floating-point operations that a batch's distinct tokens ask for: policy forward and backward, reference forward.

    Two a weight and token forwards, two more for the gradient of the activations, two more for that of a weight that
    trains; attention 4 * layers * width for each (query, key) pair seen. Nothing computed twice counts, so neither
    does what gradient checkpointing recomputes.

    Args:
        sizes: of the policy.
        batch: may lie on a device; nothing is read from it there.
        reference: whether a reference runs; its numbers may also be looked up, or not needed.
    """
    full = sizes.trained > sizes.frozen
    attention = 4.0 * sizes.attended * _pairs_seen(batch)
    head = 2.0 * sizes.head * batch.edge_source.numel()
    policy = batch.num_tokens * (4.0 * sizes.frozen + 6.0 * sizes.trained) + 3 * attention + head * (3 if full else 2)
    return policy + (layers_flops(sizes, batch) + head if reference else 0.0)


def layers_flops(sizes: MatrixSizes, batch: PreferenceBatch) -> float:
    """Of one forward pass of the starting policy's layers: adapters are no part of it."""
    own = max(sizes.trained, sizes.frozen)
    return batch.num_tokens * 2.0 * own + 4.0 * sizes.attended * _pairs_seen(batch)


def _pairs_seen(batch: PreferenceBatch) -> int:
    """(query, key) pairs of the forest's attention: a token at depth d sees d + 1."""
    depths: list[int] = []  # of the tokens that follow each node
    seen = 0
    for node in batch.nodes:
        start = depths[node.parent] if node.parent >= 0 else 0
        end = start + node.end - node.start
        depths.append(end)
        seen += (end * (end + 1) - start * (start + 1)) // 2
    return seen
