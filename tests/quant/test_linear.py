"""QuantLinear against the dense layer of the same weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.linear import QuantLinear


def _pair(bits: int, symmetric: bool, bias: bool = True) -> tuple[QuantLinear, nn.Linear, QuantizedWeight]:
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(24, 64), bits, 32, symmetric=symmetric)
    dense = nn.Linear(64, 24, bias=bias)
    dense.weight.data = weight.dequantize()
    return QuantLinear(weight, dense.bias.data if bias else None), dense, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradient_are_those_of_the_dense_layer(bits: int, symmetric: bool, bias: bool) -> None:
    quantized, dense, _ = _pair(bits, symmetric, bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    same_x = x.detach().clone().requires_grad_()
    grad_y = torch.randn(2, 5, 24)
    y, same_y = quantized(x), dense(same_x)
    y.backward(grad_y)
    same_y.backward(grad_y)
    # The same sums of 64 (or 24) products in another order of adding the bias: a few roundings of float32.
    torch.testing.assert_close(y, same_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, same_x.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(quantized.weight, dense.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_that_end_within_a_word_are_the_dense_weight(bits: int) -> None:
    weight = round_to_nearest(torch.randn(5, 42), bits, 14, symmetric=False)
    quantized = QuantLinear(weight, None)
    x = torch.randn(3, 42)
    assert torch.equal(quantized.weight, weight.dequantize())
    torch.testing.assert_close(quantized(x), x @ weight.dequantize().t(), rtol=1e-5, atol=1e-5)


def test_gradient_is_the_derivative() -> None:
    quantized, _, _ = _pair(4, False)
    quantized.to(torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(quantized, (x,))


def test_codes_stay_packed_in_memory() -> None:
    quantized, _, weight = _pair(4, False)
    held = sum(t.numel() * t.element_size() for t in (*quantized.buffers(), *quantized.parameters()))
    n, k = weight.codes.shape
    assert held == n * k // 2 + weight.scale.numel() * 2 + weight.zero_point.numel() + n * 4
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantized(torch.randn(3, 64, requires_grad=True))
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in quantized.buffers() if t.numel()}


def test_changing_the_type_keeps_the_integers_exact() -> None:
    quantized, _, weight = _pair(4, False)
    quantized.to(torch.bfloat16)
    assert quantized(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert quantized.weight.dtype == torch.bfloat16
    assert torch.equal(quantized.float().weight, weight.dequantize())


def test_peft_attaches_an_adapter_to_all_linear() -> None:
    peft = pytest.importorskip("peft")
    quantized, dense, _ = _pair(4, False)
    model = peft.get_peft_model(nn.Sequential(quantized), peft.LoraConfig(target_modules="all-linear", r=4))
    x = torch.randn(2, 64)
    # A fresh adapter adds exactly nothing.
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    model(x).sum().backward()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
