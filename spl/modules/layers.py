"""The decoder layers of a policy, one by one: what is sharded as a group, and what torch.compile is given."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from spl.logprobs.attention import FOREST, forest_attention
from spl.logprobs.score import base_of


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers says belong together on a device."""
    base: Any = base_of(model)
    kinds = set(base._no_split_modules or ())
    # A sharded layer is of a class derived from its own.
    return [module for module in base.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]


def compile_layers(model: nn.Module, checkpointing: bool, backend: Any = "inductor") -> None:
    """Have torch.compile make each decoder layer's kernels, once for batches of any size.

    The forest's attention stays out of its graphs: it loops over the nodes of each batch, and has kernels of its own.
    Where activations are recomputed, transformers does that within the layer, which such a gap would keep torch from
    compiling at all: then the parts of the layer are compiled in its place.

    Args:
        model: whose layers run in place of what they were; a copy of it is not compiled.
        checkpointing: whether activations are recomputed.
        backend: of torch.compile.
    """
    apart: Any = torch.compiler.disable(forest_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(FOREST, apart)
    for layer in decoder_layers(model):
        for part in layer.children() if checkpointing else [layer]:
            part.compile(backend=backend, dynamic=True)
