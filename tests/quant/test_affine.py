"""Affine quantization against a slow oracle that handles one number at a time."""

from __future__ import annotations

import pytest
import torch

from olive.quant.affine import fitting_group, pack_bits, round_to_nearest, unpack_bits


def oracle(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> torch.Tensor:
    """Round to nearest with Python loops; scales rounded to float16 as they are stored."""
    out = torch.zeros_like(weight)
    top = 2**bits - 1
    for n in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[n, start : start + group_size].tolist()
            if symmetric:
                farthest = max(group, key=abs)
                scale, zero = farthest / -(2 ** (bits - 1)), 2 ** (bits - 1)
            else:
                scale, zero = (max(*group, 0) - min(*group, 0)) / top, None
            scale = torch.tensor(scale).half().float().item() or 2**-24
            if zero is None:
                zero = min(max(round(-min(*group, 0) / scale), 0), top)
            for i, value in enumerate(group):
                code = min(max(round(value / scale + zero), 0), top)
                out[n, start + i] = (code - zero) * scale
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest_equals_the_oracle(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    found = round_to_nearest(weight, bits, 16, symmetric=symmetric).dequantize()
    # A tie may round either way in float32 and float64 arithmetic: allow one code in a hundred to differ.
    differs = (found - oracle(weight, bits, 16, symmetric)).abs() > 1e-6
    assert differs.float().mean() < 0.01


def test_asymmetric_error_is_at_most_half_a_scale() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest(weight, 4, 32, symmetric=False)
    error = (quantized.dequantize() - weight).abs().view(8, 4, 32)  # [N, K] -> [N, G, S]
    scale = quantized.scale.float().unsqueeze(-1)
    # Half a step, and what rounding the scale to float16 (2^-11) moves over at most 15 steps.
    assert (error <= scale * (0.5 + 15 * 2**-11)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, -3.0])
def test_constant_groups_survive(value: float, symmetric: bool) -> None:
    quantized = round_to_nearest(torch.full((2, 32), value), 4, 16, symmetric=symmetric)
    assert (quantized.scale != 0).all()
    assert torch.allclose(quantized.dequantize(), torch.full((2, 32), value), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("bits", "largest"), [(4, 0.12), (8, 0.05)])
def test_small_weights_keep_their_precision(bits: int, largest: float) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3)) * 2e-4
    error = (round_to_nearest(weight, bits, 128, symmetric=False).dequantize() - weight).norm() / weight.norm()
    assert error < largest  # at 8 bits a scale of about 4e-6 has steps of 6e-8: 1 % and less


def test_every_code_can_be_stored_and_read_back() -> None:
    for bits in (2, 4, 8):
        values = torch.arange(256, dtype=torch.uint8).view(4, 64) & (2**bits - 1)
        packed = pack_bits(values, bits)
        assert packed.dtype == torch.int32
        assert packed.shape == (4, 64 * bits // 32)
        assert torch.equal(unpack_bits(packed, bits), values)


def test_one_word_in_each_row_of_a_transposed_tensor_is_unpacked() -> None:
    values = torch.randint(0, 16, (5, 8), dtype=torch.uint8)
    transposed = pack_bits(values, 4).view(1, 5).clone().t()
    assert transposed.shape == (5, 1) and transposed.stride() == (1, 5)
    assert torch.equal(unpack_bits(transposed, 4), values)


@pytest.mark.parametrize(
    ("k", "asked", "found"),
    [(256, 128, 128), (96, 128, 32), (80, 128, 16), (100, 128, None), (96, 96, 96), (96, -1, 96)],
)
def test_group_size_falls_back_to_a_power_of_two_that_divides(k: int, asked: int, found: int | None) -> None:
    assert fitting_group(k, asked) == found
