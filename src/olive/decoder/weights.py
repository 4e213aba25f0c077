"""Weights as ONNX Runtime's operators lay them out.

Shape letters: N out channels, K in channels, S group size, G = K / S groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight, concatenate, fitting_group, pack_bytes, round_to_nearest

TILE = 1 << 20
"""Weights converted at once: their float32 copies (4 MB) stay in the processor's cache, which doubles speed."""


def round_weight(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight | None:
    """Round ``weight`` [N, K] to integers, some rows at a time; None where no group fits its K."""
    size = fitting_group(weight.shape[1], group_size)
    if size is None:
        return None
    parts = [round_to_nearest(rows, bits, size, symmetric=symmetric) for rows in _row_tiles(weight)]
    return concatenate(parts)


def regroup(weight: QuantizedWeight) -> QuantizedWeight | None:
    """Give a weight bits and groups that MatMulNBits and GatherBlockQuantized take; None if no group fits.

    They take 2, 4 or 8 bits: codes of 3 bits are held in 4. They take groups of a power of two, 16 to 256: scales of
    larger groups are repeated. The integers and what they stand for stay as they are.
    """
    size = weight.group_size
    block = next((b for b in (256, 128, 64, 32, 16) if size % b == 0), None)
    bits = 4 if weight.bits == 3 else weight.bits
    if block is None:
        return None
    if (bits, block) == (weight.bits, size):
        return weight
    scale = weight.scale.repeat_interleave(size // block, dim=1)  # [N, G] -> [N, G * S / block]
    zero_point = weight.zero_point.repeat_interleave(size // block, dim=1)
    # the middle of 3 bits is not the middle of 4, so that zero points have to be told
    return QuantizedWeight(weight.codes, scale, zero_point, bits, weight.symmetric and bits == weight.bits)


def blocks(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Lay out a weight for MatMulNBits: codes uint8 [N, G, S * bits / 8], scales float32 [N, G] and zero points uint8
    [N, bytes], each row filled up to whole bytes; None where all of them are the middle code, the default.
    """
    n, groups = weight.scale.shape
    codes = pack_bytes(weight.codes, weight.bits).view(n, groups, -1)  # [N, K] -> [N, G, S * bits / 8]
    scale = weight.scale.float().contiguous().numpy()
    middle = 1 << (weight.bits - 1)
    if bool((weight.zero_point == middle).all()):
        return codes.numpy(), scale, None
    return codes.numpy(), scale, pack_bytes(weight.zero_point, weight.bits).numpy()


def float_rows(weight: Tensor) -> Iterator[np.ndarray]:
    """Yield [N, K] as float32, some rows at a time."""
    for rows in _row_tiles(weight):
        yield rows.float().numpy()


def float_columns(weights: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """Yield the transpose [K, sum of N] of weights [N, K] stacked along N as float32, some rows at a time."""
    k, n = weights[0].shape[1], sum(w.shape[0] for w in weights)
    step = max(1, TILE // n)
    for start in range(0, k, step):
        tile = torch.cat([w[:, start : start + step] for w in weights])
        yield tile.t().float().contiguous().numpy()


def _row_tiles(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, TILE // weight.shape[1]))
