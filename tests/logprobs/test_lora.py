"""The fused LoRA layer against peft's own, and against the formula."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spl.logprobs.lora
from spl.logprobs.lora import FusedLinear
from spl.modules.preference import PreferenceModule

WIDE, HIGH, RANK = 6, 5, 3


def layer(kind: type[Linear], bias: bool = True, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """A layer whose adapters do something; the same numbers for either kind."""
    torch.manual_seed(0)
    base = nn.Linear(WIDE, HIGH, bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout)
    made = kind(base, "default", config=config, r=RANK, lora_alpha=2 * RANK)
    for matrices in (made.lora_A, made.lora_B):
        nn.init.normal_(matrices.double()["default"].weight)
        matrices.to(dtype)
    return made


def given(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, WIDE, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def run(made: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    y = made(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}  # type: ignore[dict-item]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each fused product."""
    calls: list[int] = []
    product = spl.logprobs.lora._LoraProduct.apply
    monkeypatch.setattr(spl.logprobs.lora._LoraProduct, "apply", lambda *args: (calls.append(1), product(*args))[1])
    return calls


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft_s(bias: bool, fused: list[int]) -> None:
    expected, actual = run(layer(Linear, bias), given()), run(layer(FusedLinear, bias), given())
    assert fused and actual.keys() == expected.keys() == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-12)


def test_is_the_formula() -> None:
    made, x = layer(FusedLinear), given()
    weight = made.base_layer.weight + 2.0 * made.lora_B["default"].weight @ made.lora_A["default"].weight
    torch.testing.assert_close(made(x), x @ weight.t() + made.base_layer.bias, rtol=0, atol=1e-12)


def test_gradients_by_differences() -> None:
    made, x = layer(FusedLinear), given()
    a, b = made.lora_A["default"].weight, made.lora_B["default"].weight
    assert torch.autograd.gradcheck(lambda *_: made(x), (x, a, b))


def test_under_checkpointing(fused: list[int]) -> None:
    plain, made = run(layer(FusedLinear), given()), layer(FusedLinear)
    again = run(Checkpointed(made), given())
    assert len(fused) == 3
    torch.testing.assert_close(again["y"], plain["y"], rtol=0, atol=0)
    torch.testing.assert_close(made.lora_A["default"].weight.grad, plain["lora_A.default.weight"], rtol=0, atol=1e-12)


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in backward."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.made, x, use_reentrant=False)


def test_a_first_layer_whose_input_takes_no_gradient() -> None:
    made = layer(FusedLinear)
    made(given().detach()).sum().backward()
    assert made.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("state", ["off", "merged", "dropout", "trained base", "two adapters"])
def test_whatever_else_is_peft_s_own(state: str, fused: list[int]) -> None:
    results = []
    for kind in (Linear, FusedLinear):
        made = layer(kind, dropout=0.5 if state == "dropout" else 0.0)
        if state == "off":
            made.enable_adapters(False)
        elif state == "merged":
            made.merge()
        elif state == "trained base":
            made.base_layer.requires_grad_(True)
        elif state == "two adapters":
            made.update_layer("more", RANK, lora_alpha=RANK, config=LoraConfig(r=RANK))
            made.lora_A["more"].double()
            made.lora_B["more"].double()
            made.set_adapter(["default", "more"])
        torch.manual_seed(2)
        results.append(made(given()))
    assert not fused
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_bfloat16_activations_keep_their_dtype_and_adapters_their_own(fused: list[int]) -> None:
    made = layer(FusedLinear, dtype=torch.bfloat16)
    made.lora_A.float()
    made.lora_B.float()
    exact = layer(FusedLinear)
    result, expected = run(made, given(torch.bfloat16)), run(exact, given())
    assert fused and result["y"].dtype == result["x"].dtype == torch.bfloat16
    assert result["lora_A.default.weight"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(result[name].double(), value, rtol=0.1, atol=0.1 * value.abs().max().item())


def test_autocast_takes_its_products_in_bfloat16(fused: list[int]) -> None:
    made, exact = layer(FusedLinear, dtype=torch.float32), layer(FusedLinear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = made(given(torch.float32))
    assert fused and result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact(given()), rtol=0, atol=0.1)


def test_a_policy_has_it_on_every_linear_layer_but_the_head() -> None:
    policy = PreferenceModule("tiny").load_policy()
    kinds = {type(module).__name__ for name, module in policy.named_modules() if name.endswith("_proj")}
    assert kinds == {"FusedLinear"}
