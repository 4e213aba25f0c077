"""K-quant rounding: search each group's scale and zero point for the least squared error, weighted by the inputs.

Source: ``make_qkx3_quants`` and ``make_qx_quants`` of ggml (llama.cpp, 2023): try a grid of ranges, round, refit the
scale by weighted least squares, keep the best. There a group's minimum is a float; here zero points are integers, so a
refitted minimum would have to be rounded. Instead the neighbours of the rounded zero point are tried, with rounding and
refitting alternated for each: within 0.1 % of the error of an exhaustive search over all zero points and 60 ranges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight, choose_qparams, quantize

RANGES = 11
NARROWEST, WIDEST = 0.5, 1.08
"""Ranges that are tried, as shares of the range from the smallest to the largest weight."""
REFITS = 2
TILE = {"cpu": 1 << 20}
"""Weights that are searched at a time, by device (elsewhere all): a processor's cache holds them, in half the time."""


def kquant(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize ``weight`` [N, K], minimizing ``importance * (weight - rounded)^2`` group by group.

    ``importance`` float [K] is the mean square of each input channel; None: all channels count the same, and no data is
    needed. The error is never above that of ``round_to_nearest``, which is among the candidates.
    """
    k = weight.shape[1]
    weights = torch.ones(k, device=weight.device) if importance is None else importance.float()
    weights = weights.view(-1, group_size)  # [K] -> [G, S]
    tiles = weight.split(max(1, TILE.get(weight.device.type, weight.numel()) // k))
    found = [_search(tile.float().view(len(tile), -1, group_size), weights, bits, symmetric) for tile in tiles]
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return quantize(weight, scale, zero_point, bits, symmetric=symmetric)


def _search(grouped: Tensor, weights: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale float32 and zero point uint8, both [N, G], for ``grouped`` [N, G, S] and ``weights`` [G, S]."""
    top = 2**bits - 1
    low, high = grouped.aminmax(dim=-1)  # [N, G]
    first_scale, first_zero = choose_qparams(low, high, bits, symmetric=symmetric)
    best = first_scale, first_zero.float()
    best_error = torch.full_like(first_scale, torch.inf)
    weighted = weights * grouped
    for step in range(-1, RANGES):
        share = 1.0 if step < 0 else NARROWEST + step * (WIDEST - NARROWEST) / (RANGES - 1)
        start, zero = choose_qparams(low * share, high * share, bits, symmetric=symmetric)
        for shift in (0,) if symmetric or step < 0 else (-1, 0, 1):
            scale, zero_point = start, (zero.float() + shift).clamp(0, top)
            for _ in range(1 + REFITS):
                levels = (grouped / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)).round_().clamp_(0, top)
                levels -= zero_point.unsqueeze(-1)
                error = ((levels * scale.unsqueeze(-1) - grouped).square_() * weights).sum(-1)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
                # Least squares for these levels; rounded to float16 as it is stored, so that the error is the real one.
                fitted = ((weighted * levels).sum(-1) / (levels.square() * weights).sum(-1)).half().float()
                scale = torch.where(fitted.isfinite() & (fitted * scale > 0), fitted, scale)
    return best[0], best[1].to(torch.uint8)
