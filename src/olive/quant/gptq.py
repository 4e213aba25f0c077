"""GPTQ: round a weight column by column, moving each rounding error onto the columns that are still to come.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323 (2022). Columns are taken by falling input energy (activation order) over groups whose scales are fixed
beforehand (static groups), so that the checkpoint needs no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight
from olive.quant.awq import clip_and_round

BLOCK = 128
"""Columns whose errors are gathered before the rest of the weight is updated in one product."""


def gptq(weight: Tensor, gram: Tensor, ranges: QuantizedWeight, damping: float = 0.01) -> QuantizedWeight:
    """Choose codes for ``weight`` [N, K] that keep the output of inputs with Gram matrix ``gram`` [K, K].

    ``ranges`` gives scale and zero point of every group; its codes are not used. ``damping`` is added to the Gram
    matrix's diagonal as a share of its mean, and grows tenfold for as long as the matrix is not positive definite.
    """
    n, k = weight.shape
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = inverse_factor(gram[order][:, order], damping)
    group = order // ranges.group_size
    scale = ranges.scale.float()[:, group]  # [N, G] -> [N, K], in the order of the columns
    zero_point = ranges.zero_point.float()[:, group]
    left = weight.float()[:, order]
    codes = torch.empty_like(left)
    top = 2**ranges.bits - 1
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, factor = left[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, s, z = block[:, i], scale[:, start + i], zero_point[:, start + i]
            code = (column / s + z).round_().clamp_(0, top)
            codes[:, start + i] = code
            errors[:, i] = (column - (code - z) * s) / factor[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * factor[i, i + 1 :]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    placed = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    placed[:, order] = codes.to(torch.uint8)
    return QuantizedWeight(placed, ranges.scale, ranges.zero_point, ranges.bits, ranges.symmetric)


def with_ranges(
    weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool, damping: float
) -> QuantizedWeight:
    """Search the groups' ranges by their own output error, then choose codes with :func:`gptq`."""
    return gptq(weight, gram, clip_and_round(weight, gram, bits, group_size, symmetric=symmetric), damping)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor U of the damped inverse, U^T U = (G + d I)^-1, float32 [K, K].

    A channel that is always 0 tells nothing: its diagonal becomes the mean, so that its weights are just rounded.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    filled = torch.where(diagonal == 0, mean, 0)
    for attempt in range(6):
        damped = gram + torch.diag(filled + mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            return upper
    return torch.eye(len(gram), device=gram.device)  # nothing to go by: round to nearest
