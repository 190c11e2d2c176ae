"""What a real training step holds and computes.

Bytes are those of live tensors, counted as operations make them and let them go; operations are counted by torch.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spl.data.collate import EncodedExample, collate
from spl.types import Comparison, PreferenceBatch


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.grow(storage.nbytes())
            weakref.finalize(storage, self._drop, storage._cdata)

    def grow(self, size: int) -> None:
        """Count bytes that no operation shows."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class Held(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    moments: int
    reference: int
    working: int  # at most, besides these


def held_by(module: Any, batch: PreferenceBatch, mixed: bool = False) -> Held:
    """A second step's forward and backward pass, when gradients and AdamW's moments are there."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            result: Tensor = module.loss_of(batch)
        return result

    trained = [p for p in module.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss().backward()
    optimizer.step()
    copy: nn.Module | None = module.reference.model
    lasting = [*module.policy.parameters(), *(copy.parameters() if copy else ())]
    lasting += [p.grad for p in trained]
    return Held(
        weights=sum(p.nbytes for p in module.policy.parameters()),
        gradients=sum(p.grad.nbytes for p in trained),
        moments=sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.ndim),
        reference=sum(p.nbytes for p in copy.parameters()) if copy else 0,
        working=_working(lambda: loss().backward(), lasting),
    )


def _working(step: Callable[[], object], lasting: list[Tensor]) -> int:
    with Live() as live:
        for tensor in lasting:
            live.add(tensor)
        before = live.now
        step()
    return live.peak - before


def random_pairs(vocabulary: int, prompt: int, reply: int, count: int) -> PreferenceBatch:
    """Pairs of random tokens, so that a prompt is all that two sequences share."""
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary // 2, vocabulary, (length,), generator=draw).tolist())

    examples = []
    for _ in range(count):
        start = text(prompt)
        ends = (start + text(reply), start + text(reply))
        examples.append(EncodedExample(ends, (prompt,) * 2, (Comparison(0, 1, 1.0),), None, ""))
    return collate(examples)


def _attention(products: int) -> Any:
    """Operations of a fused kernel, of whose products each is [q, D] times [D, k] or alike."""

    def count(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        query, key = shapes[:2] if products == 2 else shapes[1:3]
        batch, heads, queries, width = query
        return products * 2 * int(batch * heads * queries * key[2] * width)

    return count


def _product_in_place(total: Any, left: Any, right: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(left[0] * left[1] * right[1])


NOT_KNOWN = {  # to torch's counter
    torch.ops.aten.addmm_: _product_in_place,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention(2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5),  # the scores again
}


def flops_of(step: Callable[[], object]) -> float:
    """Operations of a step as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping=NOT_KNOWN) as counter:
        step()
    return float(counter.get_total_flops())
