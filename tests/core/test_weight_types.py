"""Networks whose weights are no plain tensors are refused by name, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rba_compress import Budget, ModelError, compress, heal, supports
from tests.networks import BRIEF, LIGHT, Chain, loader, rows, seeded


class Int8(Tensor):
    """Eight-bit codes and a scale in a wrapper, as quantisers make them."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)  # type: ignore[no-any-return]

    def __init__(self, value: Tensor) -> None:
        self.scale = value.abs().amax(1, keepdim=True) / 127
        self.codes = (value / self.scale).round().to(torch.int8)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.codes * a.scale if isinstance(a, Int8) else a for a in args]
        if func is torch.ops.aten.detach.default:
            return cls(plain[0])
        if func in (torch.ops.aten.t.default, torch.ops.aten.addmm.default):
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(str(func))


class Packed(nn.Parameter):
    """Two four-bit codes a byte."""


class Codes(nn.Module):
    """A layer of another package, its codes in an ordinary buffer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (127 * layer.weight.detach()).round().to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight / 127).T


Codes.__module__ = "auto_gptq.nn_modules"


def with_weight(make: Callable[[Tensor], Tensor], path: str = "blocks.1.up") -> nn.Module:
    model = seeded(Chain)
    layer = model.get_submodule(path)
    value = make(layer.weight.detach())  # type: ignore[union-attr, operator]
    layer.weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)  # type: ignore[assignment]
    return model


def packed(weight: Tensor) -> Tensor:
    return Packed(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), False)


def with_codes() -> nn.Module:
    model = seeded(Chain)
    model.set_submodule("blocks.2.down", Codes(model.get_submodule("blocks.2.down")))  # type: ignore[arg-type]
    return model


CASES: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("a wrapper", lambda: with_weight(Int8), r"blocks.1.up.weight is a tests Int8, which cannot be read"),
    ("of the head alone", lambda: with_weight(Int8, "head"), "head.weight is a tests Int8"),
    ("a packed parameter", lambda: with_weight(packed), "blocks.1.up.weight is a tests Packed"),
    ("float8", lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), "is a tensor of float8_e4m3fn"),
    ("codes in a buffer", with_codes, "blocks.2.down is a Codes with packed weights"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "message"), CASES, ids=[case[0] for case in CASES])
def test_weights_that_are_no_plain_tensors_are_refused(
    name: str, build: Callable[[], nn.Module], message: str
) -> None:
    message = f"{message}.*compress and save the network first, and quantise"
    with pytest.raises(ModelError, match=message):
        supports(build(), rows(4))
    with pytest.raises(ModelError, match=message):
        compress(build(), loader(), budget=Budget(macs=0.8), config=LIGHT)


def test_a_network_that_was_quantised_later_is_not_saved_or_healed(tmp_path: Any) -> None:
    original = seeded(Chain)
    result = compress(original, loader(), budget=Budget(macs=0.8), config=LIGHT)
    layer = result.model.get_submodule("head")
    layer.weight = nn.Parameter(Int8(layer.weight.detach()), False)  # type: ignore[union-attr, operator, arg-type, assignment]
    with pytest.raises(ModelError, match="head.weight is a tests Int8"):
        result.save(tmp_path / "compressed")
    with pytest.raises(ModelError, match="head.weight is a tests Int8"):
        heal(result.model, loader(400, 50), original=original, healing=BRIEF)


def test_ordinary_parameters_of_other_kinds_are_taken() -> None:
    model = seeded(Chain)
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    model.register_buffer("coarse", torch.ones(2, dtype=torch.bfloat16))

    class Tagged(nn.Parameter):
        """A parameter that knows more than its value."""

    layer = model.get_submodule("blocks.1.up")
    layer.weight = Tagged(layer.weight.detach())  # type: ignore[union-attr, operator, assignment]
    assert len(supports(model, rows(4)).chains[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_is_refused_before_and_works_after(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = seeded(Chain, width=16)
    result = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    for network in (model, result.model):
        quantization.quantize_(network, getattr(quantization, name)())
    with pytest.raises(ModelError, match=r"stem.weight is a torchao \w+Tensor, which cannot be read"):
        compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert result.model(rows(4)).isfinite().all()
