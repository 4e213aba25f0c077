"""HQQ: its shrinkage against a search over numbers, its result against rounding to nearest in its own error."""

from __future__ import annotations

import pytest
import torch

from olive.quant import hqq as half_quadratic
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.hqq import NORM, hqq


def problem() -> torch.Tensor:
    """Draw weights with outliers."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 64, generator=generator)
    return torch.where(torch.rand(64, 64, generator=generator) < 0.03, weight * 5, weight)


def error(weight: torch.Tensor, found: QuantizedWeight) -> torch.Tensor:
    """Sum of abs(error)^p of every group, [N, G], in float64."""
    return (found.dequantize().double() - weight.double()).abs().pow(NORM).view(len(weight), -1, 32).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_group_is_worse_in_its_error_than_rounded_to_nearest(bits: int, symmetric: bool) -> None:
    weight = problem()
    found = error(weight, hqq(weight, bits, 32, symmetric=symmetric))
    plain = error(weight, round_to_nearest(weight, bits, 32, symmetric=symmetric))
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.985 * plain.sum()


def test_outliers_do_not_rule() -> None:
    weight = problem()
    found = hqq(weight, 3, 32, symmetric=False).dequantize() - weight
    plain = round_to_nearest(weight, 3, 32, symmetric=False).dequantize() - weight
    usual = weight.abs() < 3
    assert found[usual].abs().mean() < 0.95 * plain[usual].abs().mean()


def test_it_is_the_slow_version_of_one_group() -> None:
    weight = problem()[:3, :32]
    found = hqq(weight, 3, 32, symmetric=False)
    for n in range(3):
        scale, zero = slow(weight[n].tolist(), 7)
        assert found.scale[n, 0].item() == pytest.approx(scale, rel=2e-3)  # float16 scales, float32 sums
        assert found.zero_point[n, 0].item() == zero


def slow(group: list[float], top: int) -> tuple[float, int]:
    """Run the turns with Python floats; returns the best scale and zero point."""

    def half(x: float) -> float:
        return torch.tensor(x).half().item()

    def codes(s: float, z: float) -> list[int]:
        return [min(max(round(x / s + z), 0), top) for x in group]

    def fit(kept: list[float], levels: list[float]) -> float:
        return half(sum(a * b for a, b in zip(kept, levels, strict=True)) / sum(b * b for b in levels))

    def cost(s: float, z: int) -> float:
        return sum(abs((q - z) * s - x) ** NORM for q, x in zip(codes(s, z), group, strict=True))

    scale = unit = half((max(*group, 0) - min(*group, 0)) / top)
    zero: float = round(-min(*group, 0) / scale)
    tried = {(scale, int(zero)): cost(scale, int(zero))}
    penalty = half_quadratic.PENALTY
    for _ in range(half_quadratic.TURNS):
        q = codes(scale, zero)
        kept = []
        for x, code in zip(group, q, strict=True):
            r = (x - (code - zero) * scale) / unit
            left = max(abs(r) - max(abs(r), 1e-8) ** (NORM - 1) / penalty, 0)
            kept.append(x - (left if r > 0 else -left) * unit)
        zero = min(max(sum(c - x / scale for c, x in zip(q, kept, strict=True)) / len(q), 0), top)
        storable = round(zero)
        s = fit(kept, [c - storable for c in q])
        tried[s, storable] = cost(s, storable)
        scale = fit(kept, [c - zero for c in q])
        penalty *= half_quadratic.PENALTY_GROWTH
    return min(tried, key=lambda pair: tried[pair])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, -3.0])
def test_constant_groups_are_survived(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 32), value)
    found = hqq(weight, 4, 16, symmetric=symmetric)
    assert (found.scale != 0).all()
    assert torch.allclose(found.dequantize(), weight, atol=1e-4, rtol=1e-3)
