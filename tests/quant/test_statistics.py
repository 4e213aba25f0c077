"""Sums over a layer's inputs against sums over one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive.quant import statistics
from olive.quant.statistics import InputStatistics


def inputs(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """Draw what a layer sees, x [T, K], and what the float model has in its place."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator)
    return x, x + 0.1 * torch.randn(tokens, k, generator=generator)


def by_token(x: Tensor, expected: Tensor) -> Tensor:
    """Return the mean of (x' - x) x^T, one token after the other, in float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for own, wanted in zip(x.double(), expected.double(), strict=True):
        total += torch.outer(wanted - own, own)
    return total / len(x)


def test_the_mean_difference_is_that_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "ROWS", 7)  # several parts, the last one short
    x, expected = inputs(24, 6)
    found = InputStatistics(6, "cpu")
    for rows in (slice(0, 16), slice(16, 24)):
        batch = x[rows].view(2, -1, 6)
        found.compare(batch, expected[rows].view(2, -1, 6))
        found.add(batch)
    cross = found.mean_cross()
    assert cross is not None
    assert torch.allclose(cross.double(), by_token(x, expected), atol=1e-6)
    # Not the transposed one, and no difference where there is none.
    assert not torch.allclose(cross.double(), by_token(x, expected).t(), atol=1e-3)
    same = InputStatistics(6, "cpu")
    same.compare(x, x)
    same.add(x)
    nothing = same.mean_cross()
    assert nothing is not None
    assert not nothing.any()


def test_there_is_no_mean_difference_unless_every_token_was_compared() -> None:
    x, expected = inputs(24, 6)
    found = InputStatistics(6, "cpu")
    found.add(x)
    assert found.mean_cross() is None
    found.compare(x, expected)
    assert found.mean_cross() is not None
    found.add(x[:1])
    assert found.mean_cross() is None


def test_channels_that_were_scaled_count_as_if_seen_so() -> None:
    x, _ = inputs(40, 6)
    scale = torch.linspace(0.5, 3, 6)
    found, direct = InputStatistics(6, "cpu"), InputStatistics(6, "cpu")
    found.add(x)
    found.rescale(scale)
    direct.add(x / scale)
    for one, other in zip(found.sums(), direct.sums(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.largest(), (x / scale).abs().amax(0))
