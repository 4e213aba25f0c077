"""Activation-aware weight quantization: scale input channels, then clip, so that rounding hurts the output least.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978 (2023). The paper measures the error
of each candidate by running the layer again. Here it is read off the Gram matrix of the inputs, G = X^T X / T: for a
change dW of a weight, the mean squared change of the output is tr(dW G dW^T), exactly, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight, choose_qparams, quantize, round_to_nearest
from olive.quant.layer import InputStatistics, Layer, output_error

SCALE_GRID = 20
CLIP_GRID = 20
CLIP_TO = 0.5
SEARCH_ROWS = 2048
"""Rows of a weight, evenly taken, that the search of input scales looks at; the scale is one for all rows."""


def search_scale(
    weights: list[Tensor],
    statistics: InputStatistics,
    rounded: Callable[[Tensor], QuantizedWeight],
    foldable: Callable[[Tensor], Tensor],
) -> Tensor:
    """Find the channel scale s [K] that minimizes the output error of all ``weights`` [N_i, K] that read one input.

    Candidates are s = a^r / w^(1 - r) for r on a grid, with a the mean activation magnitude and w the mean relative
    weight magnitude per channel, and s = 1. ``rounded`` quantizes a weight; ``foldable`` maps a scale
    to the nearest one that the producer can take.
    """
    gram, activation = statistics.mean_gram(), statistics.mean_absolute().clamp(min=1e-6)
    stacked = torch.cat(weights)
    magnitude = (stacked.abs() / stacked.abs().amax(dim=1, keepdim=True).clamp(min=1e-8)).mean(0).clamp(min=1e-6)
    best, best_error = torch.ones_like(activation), None
    for step in range(-1, SCALE_GRID):
        if step < 0:
            scale = torch.ones_like(activation)
        else:
            ratio = step / SCALE_GRID
            scale = activation**ratio / magnitude ** (1 - ratio)
            scale = foldable((scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4))
        error = sum(output_error(rounded(w * scale).dequantize() / scale - w, gram) for w in weights)
        if torch.isfinite(torch.as_tensor(error)) and (best_error is None or error < best_error):
            best, best_error = scale, error
    return best


def clip_and_round(weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Quantize ``weight`` [N, K], shrinking each group's range where that lowers its output error.

    The error of one group of one row is dw G_gg dw^T with G_gg [S, S] the group's block of the Gram matrix.
    """
    n, k = weight.shape
    g = k // group_size
    grouped = weight.float().view(n, g, group_size)  # [N, K] -> [N, G, S]
    index = torch.arange(g, device=weight.device)
    blocks = gram.view(g, group_size, g, group_size)[index, :, index]  # [K, K] -> [G, S, S]
    low, high = grouped.aminmax(dim=-1)  # [N, G]
    best_low, best_high, best_error = low, high, torch.full_like(low, torch.inf)
    for step in range(CLIP_GRID):
        shrink = 1 - step * (1 - CLIP_TO) / CLIP_GRID
        scale, zero_point = choose_qparams(low * shrink, high * shrink, bits, symmetric=symmetric)
        change = quantize(weight, scale, zero_point, bits, symmetric=symmetric).dequantize().view(n, g, -1) - grouped
        projected = torch.bmm(change.transpose(0, 1), blocks).transpose(0, 1)  # [G, N, S] x [G, S, S]
        error = (projected * change).sum(-1)  # [N, G]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
    scale, zero_point = choose_qparams(best_low, best_high, bits, symmetric=symmetric)
    return quantize(weight, scale, zero_point, bits, symmetric=symmetric)


def scale_inputs(layer: Layer, groups: Mapping[str, Any]) -> None:
    """Scale every input that folds, for the linears that ``groups`` quantizes; the layer still computes the same."""
    for site in layer.sites:
        read = [name for name in site.linears if groups.get(name)]
        if site.fold is None or not read:
            continue
        group = groups[read[0]]
        scale = search_scale(
            [_some_rows(layer.weight(name)) for name in read],
            layer.statistics[site],
            partial(round_to_nearest, bits=group.bits, group_size=group.group_size, symmetric=layer.symmetric),
            site.fold.channel_scale,
        )
        layer.scale(site, scale)


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: max(1, len(weight) // SEARCH_ROWS)]
