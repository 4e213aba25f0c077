"""The range search against an exhaustive one, and against rounding to nearest, which it must never be worse than."""

from __future__ import annotations

import pytest
import torch

from olive.quant import kquant as searches
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.kquant import kquant


def problem(n: int = 8, k: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw heavy-tailed weights and channels of very different importance."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(n, k, generator=generator) * (1 + torch.rand(n, k, generator=generator) ** 8 * 4)
    return weight, torch.rand(k, generator=generator) ** 4 * 10 + 0.1


def error(weight: torch.Tensor, found: QuantizedWeight, importance: torch.Tensor, size: int) -> torch.Tensor:
    """Weighted squared error of every group, [N, G]."""
    squared = (found.dequantize().double() - weight.double()).square() * importance
    return squared.view(len(weight), -1, size).sum(-1)


def exhaustive(group: list[float], weights: list[float], bits: int, symmetric: bool) -> float:
    """Try every zero point with 300 scales, one number at a time."""
    top = 2**bits - 1
    span = max(*group, 0) - min(*group, 0)
    best = float("inf")
    for zero in [2 ** (bits - 1)] if symmetric else range(top + 1):
        for step in range(300):
            size = torch.tensor(span * (0.2 + step * 0.004) / top * (2 if symmetric else 1)).half().item()
            for scale in (size, -size) if symmetric else (size,):
                total = 0.0
                for value, weight in zip(group, weights, strict=True):
                    code = min(max(round(value / scale + zero), 0), top)
                    total += weight * ((code - zero) * scale - value) ** 2
                best = min(best, total)
    return best


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_finds_nearly_what_an_exhaustive_search_finds(bits: int, symmetric: bool) -> None:
    weight, importance = problem(n=3)
    found = error(weight, kquant(weight, bits, 16, symmetric=symmetric, importance=importance), importance, 16)
    slow = [
        [exhaustive(weight[n, part].tolist(), importance[part].tolist(), bits, symmetric) for part in GROUPS]
        for n in range(3)
    ]
    ratio = found.sum().item() / sum(map(sum, slow))
    # Asymmetric within a few parts in a hundred; symmetric scales keep the sign of the largest weight's.
    assert ratio < (1.05 if symmetric else 1.02)
    assert (found > 0.98 * torch.tensor(slow)).all()  # the slow search's grid of scales is finer than 1 %


GROUPS = (slice(0, 16), slice(16, 32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_is_worse_than_rounded_to_nearest(bits: int, symmetric: bool, weighted: bool) -> None:
    weight, importance = problem(n=64)
    given = importance if weighted else None
    measured = importance if weighted else torch.ones(32)
    found = error(weight, kquant(weight, bits, 16, symmetric=symmetric, importance=given), measured, 16)
    plain = error(weight, round_to_nearest(weight, bits, 16, symmetric=symmetric), measured, 16)
    assert (found <= plain * (1 + 1e-4)).all()  # errors are compared in float32
    assert found.sum() < (0.98 if bits == 8 else 0.93) * plain.sum()


def test_importance_moves_the_error_to_channels_that_matter_less() -> None:
    weight, importance = problem(n=64)
    blind = kquant(weight, 3, 16, symmetric=False)
    seeing = kquant(weight, 3, 16, symmetric=False, importance=importance)
    ones = torch.ones(32)
    assert error(weight, seeing, importance, 16).sum() < 0.9 * error(weight, blind, importance, 16).sum()
    assert error(weight, seeing, ones, 16).sum() > error(weight, blind, ones, 16).sum()


def test_rows_are_searched_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = problem()
    whole = kquant(weight, 4, 16, symmetric=False, importance=importance)
    monkeypatch.setattr(searches, "TILE", {"cpu": 96})
    tiled = kquant(weight, 4, 16, symmetric=False, importance=importance)
    assert torch.equal(whole.codes, tiled.codes)
    assert torch.equal(whole.scale, tiled.scale)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, -3.0])
def test_constant_groups_and_silent_channels_are_survived(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 32), value)
    for importance in (None, torch.zeros(32)):
        found = kquant(weight, 4, 16, symmetric=symmetric, importance=importance)
        assert (found.scale != 0).all()
        assert torch.allclose(found.dequantize(), weight, atol=1e-4, rtol=1e-3)
