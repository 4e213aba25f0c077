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
from olive.quant.columns import round_columns


def gptq(weight: Tensor, gram: Tensor, ranges: QuantizedWeight, damping: float = 0.01) -> QuantizedWeight:
    """Choose codes for ``weight`` [N, K] that keep the output of inputs with Gram matrix ``gram`` [K, K].

    ``ranges`` gives scale and zero point of every group; its codes are not used. ``damping`` is added to the Gram
    matrix's diagonal as a share of its mean, and grows tenfold for as long as the matrix is not positive definite.

    Matrices of one shape go together: with ``weight`` [B, N, K], ``gram`` [B, K, K] and ``ranges`` whose scale and zero
    point are [B, N, G], the codes are [B, N, K]; damping grows for each matrix by itself.
    """
    if weight.dim() == 2:
        one = QuantizedWeight(ranges.codes, ranges.scale[None], ranges.zero_point[None], ranges.bits, ranges.symmetric)
        codes = gptq(weight[None], gram[None], one, damping).codes[0]
        return QuantizedWeight(codes, ranges.scale, ranges.zero_point, ranges.bits, ranges.symmetric)
    k, groups = weight.shape[-1], ranges.scale.shape[-1]
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(descending=True, stable=True)  # [B, K]
    matrix = torch.arange(len(order), device=order.device)[:, None]
    ordered = gram[matrix, order].mT[matrix, order]  # symmetric, so that rows taken twice are rows and columns
    found = round_columns(
        weight.mT[matrix, order].float(),  # [B, N, K] -> [B, K, N]
        lower_factor(ordered, damping),
        ranges.scale.mT.float().contiguous(),  # [B, N, G] -> [B, G, N]
        ranges.zero_point.mT.float().contiguous(),
        order // (k // groups),
        ranges.bits,
    )
    codes = torch.empty_like(found)
    codes[matrix, order] = found
    return QuantizedWeight(codes.mT.contiguous(), ranges.scale, ranges.zero_point, ranges.bits, ranges.symmetric)


def with_ranges(
    weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool, damping: float
) -> QuantizedWeight:
    """Search the groups' ranges by their own output error, then choose codes with :func:`gptq`."""
    return gptq(weight, gram, clip_and_round(weight, gram, bits, group_size, symmetric=symmetric), damping)


def compensate(weight: Tensor, gram: Tensor, cross: Tensor, damping: float = 0.01) -> Tensor:
    """Return the weight [N, K] that gives, from the inputs a layer sees, the float model's outputs as nearly as it can.

    A layer behind quantized ones sees x where the float model has x'. ``gram`` [K, K] is the mean over tokens of x x^T
    and ``cross`` [K, K] that of (x' - x) x^T, of the same tokens. The result W' minimizes the mean of |W x' - W' x|^2
    plus d |W' - W|^2, with d = ``damping`` times the mean of the Gram matrix's diagonal: W' = W + W C (G + d I)^-1.
    Rounding W' for inputs with Gram matrix G then keeps the float model's output.

    The aim is that of Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    arXiv 2504.02692 (2025), which lets each column's part be made up for by later columns only; here by all.
    """
    upper = _damped_factor(gram[None], damping)[0]
    return weight.float() + torch.cholesky_solve((weight.float() @ cross).t(), upper, upper=True).t()


def lower_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the unit lower triangular L with L^T D L = G + d I for some diagonal D, float32 [B, K, K].

    A channel that is always 0 tells nothing: its diagonal becomes the mean, so that its weights are just rounded.
    """
    # With R the reversal of rows and columns, R (G + d I) R = U^T U gives G + d I = (R U R)^T (R U R).
    lower = _damped_factor(gram.flip(-2, -1), damping).flip(-2, -1)
    return (lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).contiguous()


def _damped_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = G + d I of each matrix; I where no damping makes it definite."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # [B, K]
    mean = diagonal.mean(-1, keepdim=True).clamp(min=1e-12)
    share = torch.full_like(mean, damping)
    for _ in range(6):
        damped = gram + torch.diag_embed(torch.where(diagonal == 0, mean, 0) + mean * share)
        upper, info = torch.linalg.cholesky_ex(damped, upper=True)
        failed = (info != 0) | ~torch.isfinite(upper.diagonal(dim1=-2, dim2=-1)).all(-1)
        if not bool(failed.any()):
            return upper
        share = torch.where(failed[:, None], 10 * share, share)
    # Nothing to go by: round to nearest.
    return torch.where(failed[:, None, None], torch.eye(gram.shape[-1], device=gram.device), upper)
