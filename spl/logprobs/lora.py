"""LoRA's linear layer in as few passes over memory as it takes.

peft computes `W x + scaling * B(A(x))` as separate tensors, and autograd adds the two gradients of x; at the width of
small models, or on a CPU, those passes cost as much as the products. Here the low-rank product is added within its own
matrix product, forwards and backwards. Everything else (names, saving, merging, adapters off) is peft's.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T of x [N, in], a frozen weight [out, in], A [r, in] and B [out, r].

    The weight may have another dtype than the rest: it is cast twice, so that no copy is held in between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = x @ a.t()
        result = nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return result.addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_x = (grad @ weight.to(grad.dtype)).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low.t() @ x, (grad.t() @ low).mul_(ctx.scaling), None


class FusedLinear(Linear):
    """peft's LoRA layer around a frozen `nn.Linear`, computed by `_LoraProduct` where that is all it has to do.

    The products are taken in the dtype of the layer's input, or that of autocast: adapters in float32 are rounded for
    them, as under mixed precision.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        base = self.get_base_layer()
        if name is None or args or kwargs or base.weight.requires_grad:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        a, b = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        with torch.autocast(device, enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            product: Tensor = _LoraProduct.apply(flat, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return product.reshape(*x.shape[:-1], -1)

    def _plain_adapter(self) -> str | None:
        """The one active adapter, where it is LoRA without dropout on a plain layer and not merged; else None."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return None
        name: str = names[0]
        plain = (
            name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and type(self.get_base_layer()) is nn.Linear
        )
        return name if plain else None
