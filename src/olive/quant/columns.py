"""Round the columns of a weight in turn, each so as to make up for the rounding errors of those before it.

With a Gram matrix G = L^T D L, L unit lower triangular and D diagonal, the output error of w - q is
sum_j D_j (L (w - q))_j^2: what the errors left behind by the columns before j ask of column j is row j of L times those
errors. GPTQ's updates with the inverse of G give the same targets with more work (Chee et al., "QuIP: 2-Bit
Quantization of Large Language Models With Guarantees", arXiv 2307.13304 (2023), theorem 6; Chen et al., "The Geometry
of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv 2507.18553 (2025)).

Shape letters: B matrices of one shape, N out channels, K in channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

FEW = 16
"""Columns that PyTorch rounds one by one between two matrix products."""


@dataclass(frozen=True)
class Columns:
    """B weights that are being rounded; a column is kept as a row, so that it lies in one piece."""

    weight: Tensor
    """float32 [B, K, N]."""
    asked: Tensor
    """float32 [B, K, N]: what the columns that are done ask of each column."""
    error: Tensor
    """float32 [B, K, N]: weight minus what it was rounded to, of the columns that are done."""
    codes: Tensor
    """uint8 [B, K, N], of the columns that are done."""
    lower: Tensor
    """float32 [B, K, K]: L, contiguous; only what is below the diagonal is used."""
    scale: Tensor
    """float32 [B, G, N]."""
    zero_point: Tensor
    """float32 [B, G, N]."""
    group: Tensor
    """int64 [B, K]: each column's group."""
    top: int
    """The largest code."""


def round_columns(
    weight: Tensor,
    lower: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    bits: int,
    asked: Tensor | None = None,
) -> Tensor:
    """Return codes, uint8 [B, K, N], for ``weight`` (float32 [B, K, N]), rounded in the order of K.

    ``lower``: L of each Gram matrix [B, K, K]; ``scale``, ``zero_point``: float32 [B, G, N]; ``group``: each column's
    index into them, int64 [B, K]. ``asked`` [B, K, N], which is used up, is what the columns have to make up for from
    the start.
    """
    asked = torch.zeros_like(weight) if asked is None else asked
    error = torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    state = Columns(weight, asked, error, codes, lower, scale, zero_point, group, 2**bits - 1)
    rounding, size = _rounding(weight.device)
    _round(state, 0, weight.shape[1], rounding, size)
    return codes


def _rounding(device: torch.device) -> tuple[Callable[[Columns, int, int], None], int]:
    """Return what rounds a run of columns on a device, and how many it should be given."""
    # PyTorch's CUDA builds bring Triton along, but not on every system.
    if device.type == "cuda" and find_spec("triton"):
        from olive.quant import kernels

        return kernels.round_run, kernels.COLUMNS
    return round_run, FEW


def _round(state: Columns, start: int, stop: int, rounding: Callable[[Columns, int, int], None], size: int) -> None:
    """Round columns ``start`` to ``stop``: one half, then its part in the other's targets as one product, then that.

    Halving keeps the products large and reads each error log2(K / size) times instead of K / size times.
    """
    if stop - start <= size:
        rounding(state, start, stop)
        return
    middle = start + size * ((stop - start + size - 1) // size // 2)
    _round(state, start, middle, rounding, size)
    state.asked[:, middle:stop].baddbmm_(state.lower[:, middle:stop, start:middle], state.error[:, start:middle])
    _round(state, middle, stop, rounding, size)


def round_run(state: Columns, start: int, stop: int) -> None:
    """Round columns ``start`` to ``stop`` one by one; ``asked`` must hold the part of all columns before ``start``."""
    matrix = torch.arange(len(state.weight), device=state.weight.device)[:, None]
    scale = state.scale[matrix, state.group[:, start:stop]]  # [B, G, N] -> [B, stop - start, N]
    zero_point = state.zero_point[matrix, state.group[:, start:stop]]
    for i in range(start, stop):
        weight, s, z = state.weight[:, i], scale[:, i - start], zero_point[:, i - start]
        asked = state.asked[:, i, None].baddbmm_(state.lower[:, i, None, start:i], state.error[:, start:i])[:, 0]
        code = asked.add_(weight).div_(s).add_(z).round_().clamp_(0, state.top)
        state.codes[:, i] = code
        torch.sub(weight, code.sub_(z).mul_(s), out=state.error[:, i])
