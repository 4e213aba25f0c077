"""SmoothQuant's factor against the paper's formula for one channel at a time, and what it is for."""

from __future__ import annotations

import pytest
import torch

from olive.quant.affine import round_to_nearest
from olive.quant.smooth import LARGEST, smooth_scale


def problem() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw two weights and inputs of which a few channels are far larger than the others, as in language models."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 32, generator=generator)
    x[:, ::8] *= 50
    return [torch.randn(n, 32, generator=generator) for n in (6, 10)], x


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_factor_is_the_formula_of_the_paper(alpha: float) -> None:
    weights, x = problem()
    found = smooth_scale(weights, x.abs().amax(0), alpha)
    for j in range(32):
        largest_input = max(abs(v) for v in x[:, j].tolist())
        largest_weight = max(abs(v) for weight in weights for v in weight[:, j].tolist())
        assert found[j].item() == pytest.approx(largest_input**alpha / largest_weight ** (1 - alpha), rel=1e-5)


def test_the_product_stays_and_rounded_activations_hurt_it_less() -> None:
    weights, x = problem()
    scale = smooth_scale(weights, x.abs().amax(0))
    exact = x @ weights[0].t()
    assert torch.allclose((x / scale) @ (weights[0] * scale).t(), exact, atol=1e-3)

    def loss(inputs: torch.Tensor, weight: torch.Tensor) -> float:
        def rounded(t: torch.Tensor) -> torch.Tensor:
            return round_to_nearest(t, 8, 32, symmetric=True).dequantize()

        return (rounded(inputs) @ rounded(weight).t() - exact).square().mean().item()

    assert loss(x / scale, weights[0] * scale) < 0.5 * loss(x, weights[0])


def test_silent_channels_keep_their_scale_and_the_rest_is_bounded() -> None:
    weights, x = problem()
    largest = x.abs().amax(0)
    largest[3] = 0
    largest[4] = 1e30
    for weight in weights:
        weight[:, 5] = 0
    found = smooth_scale(weights, largest)
    assert found[3] == found[5] == 1
    assert found[4] == LARGEST
    assert torch.isfinite(found).all()
    assert (found > 0).all()
