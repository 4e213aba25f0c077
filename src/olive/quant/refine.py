"""Lower a quantized weight's output error by turns: the best scales for its codes, then better codes for its scales.

For a change dW of a weight whose inputs have the Gram matrix G the mean squared change of the output is tr(dW G dW^T).
With codes and zero points fixed it is quadratic in a row's scales, so that the best ones are solved for together (the
"scale estimation" of NNCF, Intel 2024, solves for one group at a time). With scales fixed it is lowered by coordinate
descent: each code in turn becomes the best integer given all others (QuantEase: Behdin et al., arXiv 2309.01885, 2023).
Both start from any quantized weight, for example GPTQ's, which looks at each column only once. No step raises the
error of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight
from olive.quant.columns import round_columns

DAMPING = 0.01
"""Share of the mean input energy that is added to every channel's, so that what the rows at hand do not show stays."""
RIDGE = 1e-6
"""Added to the diagonal of a row's equations, as a share of its mean: groups may be linearly dependent."""
TILE = 1 << 24
"""Numbers in the equations [N, G, G] of the rows that are solved at a time."""


def refine(weight: Tensor, gram: Tensor, quantized: QuantizedWeight, rounds: int) -> QuantizedWeight:
    """Alternate :func:`refit_scale` and :func:`descend` on ``quantized``, for ``weight`` [N, K], ``gram`` [K, K]."""
    gram = gram + torch.diag(gram.diagonal().mean().expand(len(gram)) * DAMPING)
    for _ in range(rounds):
        quantized = descend(weight, gram, refit_scale(weight, gram, quantized))
    return quantized


def refit_scale(weight: Tensor, gram: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """Give each row the scales that are best for its codes and zero points, rounded to the scales' stored type.

    For a row w with levels d (codes less zero points) and D [K, G] their columns by group, the step t from the old
    scales s solves ``D^T G D t = D^T G (w - D s)``. A group whose scale would change its sign or vanish keeps the old
    one, and so does a row whose error does not fall.
    """
    n, k = weight.shape
    g = quantized.scale.shape[1]
    chosen = quantized.scale.clone()
    for rows in torch.arange(n, device=weight.device).split(max(1, TILE // max(g * g, k))):
        w, scale = weight[rows].float(), quantized.scale[rows].float()
        levels = quantized.codes[rows].view(-1, g, k // g).float() - quantized.zero_point[rows].unsqueeze(-1)
        residual = w - (levels * scale.unsqueeze(-1)).view(-1, k)
        slope = ((residual @ gram).view_as(levels) * levels).sum(-1)  # D^T G (w - D s), [N, G]
        step = _solve(_equations(levels, gram), slope)
        fitted = (scale + step).to(chosen.dtype).float()
        fitted = torch.where(fitted.isfinite() & (fitted * scale > 0), fitted, scale)
        after = w - (levels * fitted.unsqueeze(-1)).view(-1, k)
        better = _row_error(after, gram) < _row_error(residual, gram)
        chosen[rows] = torch.where(better.unsqueeze(-1), fitted, scale).to(chosen.dtype)
    return replace(quantized, scale=chosen)


def _equations(levels: Tensor, gram: Tensor) -> Tensor:
    """Return D^T G D of every row, [N, G, G], for ``levels`` [N, G, S]."""
    n, g, size = levels.shape
    out = levels.new_empty(n, g, g)
    for j in range(g):
        product = levels[:, j] @ gram[j * size : (j + 1) * size]  # [N, S] x [S, K]
        out[:, j] = (product.view(n, g, size) * levels).sum(-1)
    return out


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve the positive semidefinite ``matrix`` [N, G, G] x = ``right`` [N, G] with a small ridge; 0 if that fails."""
    mean = matrix.diagonal(dim1=1, dim2=2).mean(-1)
    ridge = (mean * RIDGE).clamp(min=torch.finfo(matrix.dtype).tiny)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(-1))
    found, _ = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))
    return torch.nan_to_num(found.squeeze(-1), 0.0, 0.0, 0.0)


def descend(weight: Tensor, gram: Tensor, quantized: QuantizedWeight, sweeps: int = 2) -> QuantizedWeight:
    """Set each code in turn to the best integer given all others, ``sweeps`` times over all columns.

    With residual r = w - q, the best value of q_j is q_j + (r G)_j / G_jj; among the codes the nearest to it is best.
    A change of an earlier column, q_i - q_i', adds (q_i - q_i') G_ij / G_jj to that. A channel that is always 0 keeps
    its codes.
    """
    w = weight.float()
    energy = gram.diagonal()
    reciprocal = torch.where(energy > torch.finfo(energy.dtype).tiny, 1 / energy, 0)
    lower = (gram * reciprocal.unsqueeze(-1))[None]
    scale, zero_point = (t.float().t().contiguous()[None] for t in (quantized.scale, quantized.zero_point))
    group = torch.arange(w.shape[1], device=w.device)[None] // quantized.group_size
    found = quantized
    for _ in range(sweeps):
        now = found.dequantize()
        asked = ((w - now) @ gram * reciprocal).t().contiguous()[None]
        codes = round_columns(now.t().contiguous()[None], lower, scale, zero_point, group, quantized.bits, asked)
        found = replace(found, codes=codes[0].t().contiguous())
    better = _row_error(w - found.dequantize(), gram) < _row_error(w - quantized.dequantize(), gram)
    return replace(quantized, codes=torch.where(better.unsqueeze(-1), found.codes, quantized.codes))


def _row_error(residual: Tensor, gram: Tensor) -> Tensor:
    """Output error of every row: r G r^T for ``residual`` [N, K]; [N]."""
    return ((residual @ gram) * residual).sum(-1)
