"""Batches on disk, so that a step that went wrong can be looked at and run again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from spl.disk import replacing
from spl.secrets import redact
from spl.types import Node, PreferenceBatch

_PLAIN = ("nodes", "rows", "weight", "response_keys")
_TENSORS = tuple(name for name in PreferenceBatch._fields if name not in _PLAIN)


def write_batches(path: Path, batches: Sequence[PreferenceBatch]) -> None:
    """Write batches to one safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {f"{k}.{name}": getattr(batch, name) for k, batch in enumerate(batches) for name in _TENSORS}
    plain = [
        {
            "nodes": batch.nodes,
            "rows": [redact(row) for row in batch.rows],
            "weight": batch.weight,
            "response_keys": [key.hex() for key in batch.response_keys],
        }
        for batch in batches
    ]
    with replacing(path) as file:
        # Views of one tensor become tensors of their own, which is all that safetensors takes.
        file.write(save({k: v.cpu().clone() for k, v in tensors.items()}, {"batches": json.dumps(plain)}))


def read_batches(path: Path) -> list[PreferenceBatch]:
    """The batches of a file that `write_batches` wrote."""
    with safe_open(path, "pt") as file:
        plain: list[dict[str, Any]] = json.loads(file.metadata()["batches"])
        return [
            PreferenceBatch(
                **{name: file.get_tensor(f"{k}.{name}") for name in _TENSORS},
                nodes=tuple(Node(*node) for node in fields["nodes"]),
                rows=tuple(fields["rows"]),
                weight=fields["weight"],
                response_keys=tuple(map(bytes.fromhex, fields["response_keys"])),
            )
            for k, fields in enumerate(plain)
        ]


def readable(batch: PreferenceBatch, losses: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """Each example of a batch as a person reads it: its row, its loss in nats ("nan", "inf"), prompt and responses."""
    examples: list[dict[str, Any]] = [
        {"row": row, "loss": repr(loss), "prompt": "", "responses": []}
        for row, loss in zip(batch.rows, losses.tolist(), strict=True)
    ]
    for response, owner in enumerate(batch.response_example.tolist()):
        edges = batch.member_edge[batch.member_response == response]
        source = int(batch.edge_source[edges[0]])
        above = torch.arange(batch.num_tokens, device=edges.device) <= source
        prompt = batch.input_ids[above & (batch.subtree_end > source)]
        examples[owner]["prompt"] = tokenizer.decode(prompt.tolist())
        examples[owner]["responses"].append(tokenizer.decode(batch.edge_target[edges].tolist()))
    return examples
