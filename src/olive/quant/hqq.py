"""Half-quadratic quantization: fit scale and zero point to the weights alone, without letting outliers rule.

Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). The error is
the sum of abs(w - rounded)^p with p < 1, split by an auxiliary variable: what a shrinkage of the residual leaves is
taken for outliers, and the rest is fitted by least squares, in turns. There zero points are floats and scales stay as
they are; here zero points have to be integers, so scales are refitted to the rounded ones, and among all that could be
stored the best by the error itself is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight, choose_qparams, quantize

NORM = 0.7
"""The p of the norm."""
PENALTY, PENALTY_GROWTH = 10.0, 1.01
"""Weight of the quadratic part, for residuals in steps of the grid, and its factor from one turn to the next."""
TURNS = 20


def hqq(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Quantize ``weight`` [N, K] group by group, lowering the sum of ``abs(weight - rounded)^0.7``; needs no data.

    That error is never above that of ``round_to_nearest``, from which the turns start.
    """
    n, top = weight.shape[0], 2**bits - 1
    grouped = weight.float().view(n, -1, group_size)  # [N, K] -> [N, G, S]
    low, high = grouped.aminmax(dim=-1)
    scale, rounded_zero = choose_qparams(low, high, bits, symmetric=symmetric)
    zero = rounded_zero.float()
    unit = scale.abs().unsqueeze(-1)
    best, best_error = (scale, zero), torch.full_like(scale, torch.inf)
    candidate, penalty = best, PENALTY
    for _ in range(1 + TURNS):
        error = ((_levels(grouped, *candidate, top) * candidate[0].unsqueeze(-1) - grouped) / unit).abs_()
        error = error.pow_(NORM).sum(-1)  # [N, G]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1])
        levels = _levels(grouped, scale, zero, top)
        residual = grouped - levels * scale.unsqueeze(-1)
        kept = grouped - _shrink(residual / unit, penalty) * unit  # the weights without their outliers
        if not symmetric:
            codes = levels + zero.unsqueeze(-1)
            zero = (codes - kept / scale.unsqueeze(-1)).mean(-1).clamp(0, top)
            levels = codes - zero.unsqueeze(-1)
        storable = zero.round()
        candidate = _fit(kept, levels + (zero - storable).unsqueeze(-1), scale), storable
        scale = _fit(kept, levels, scale)
        penalty *= PENALTY_GROWTH
    return quantize(weight, best[0], best[1].to(torch.uint8), bits, symmetric=symmetric)


def _levels(grouped: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Round ``grouped`` [N, G, S] to codes and subtract the zero point [N, G], which may be a fraction."""
    codes = (grouped / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round_().clamp_(0, top)
    return codes.sub_(zero.unsqueeze(-1))


def _shrink(residual: Tensor, penalty: float) -> Tensor:
    """Shrink towards 0 by the generalized soft threshold of the p-norm: abs(r)^(p - 1) / penalty."""
    size = residual.abs()
    threshold = size.clamp(min=1e-8).pow_(NORM - 1) / penalty
    return residual.sign() * (size - threshold).clamp_(min=0)


def _fit(kept: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Least-squares scale [N, G] for ``levels`` [N, G, S], rounded to float16; the old one where that has no use."""
    fitted = ((kept * levels).sum(-1) / levels.square().sum(-1)).half().float()
    return torch.where(fitted.isfinite() & (fitted * scale > 0), fitted, scale)
