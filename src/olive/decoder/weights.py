"""Weights as ONNX Runtime's operators lay them out.

Shape letters: N out channels, K in channels, S group size, G = K / S groups.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from olive.quant.affine import QuantizedWeight, concatenate, pack_bytes

TILE = 1 << 20
"""Weights converted at once: their float32 copies (4 MB) stay in the processor's cache, which doubles speed."""
THREADS = min(8, os.cpu_count() or 1)
T = TypeVar("T")
Blocks = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes uint8 [N, G, S * bits / 8], scales float32 [N, G], zero points uint8 [N, bytes]."""


def in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run jobs on threads, only a few ahead of the caller, and yield their results in order."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for job in jobs:
            waiting.append(threads.submit(job))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def row_tiles(weight: Tensor) -> Sequence[Tensor]:
    """Cut [N, K] into rows that a processor's cache holds."""
    return weight.split(max(1, TILE // weight.shape[1]))


def block_size(group_size: int) -> int | None:
    """Return the groups that ONNX Runtime's operators take for ``group_size``: the largest power of two, 16 to 256,
    that divides it; None if there is none."""
    return next((b for b in (256, 128, 64, 32, 16) if group_size % b == 0), None)


def regroup(weight: QuantizedWeight) -> QuantizedWeight | None:
    """Give a weight bits and groups that MatMulNBits and GatherBlockQuantized take; None if no group fits.

    They take 2, 4 or 8 bits: codes of 3 bits are held in 4. Scales of groups that they do not take are repeated. The
    integers and what they stand for stay as they are.
    """
    size = weight.group_size
    block = block_size(size)
    bits = 4 if weight.bits == 3 else weight.bits
    if block is None:
        return None
    if (bits, block) == (weight.bits, size):
        return weight
    scale = weight.scale.repeat_interleave(size // block, dim=1)  # [N, G] -> [N, G * S / block]
    zero_point = weight.zero_point.repeat_interleave(size // block, dim=1)
    # the middle of 3 bits is not the middle of 4, so that zero points have to be told
    return QuantizedWeight(weight.codes, scale, zero_point, bits, weight.symmetric and bits == weight.bits)


def blocks(weight: QuantizedWeight) -> Blocks:
    """Lay out a weight for MatMulNBits; each row of zero points is filled up to whole bytes."""
    n, groups = weight.scale.shape
    codes = pack_bytes(weight.codes, weight.bits).view(n, groups, -1)  # [N, K] -> [N, G, S * bits / 8]
    scale = weight.scale.float().contiguous().numpy()
    return codes.numpy(), scale, pack_bytes(weight.zero_point, weight.bits).numpy()


def middle_zero_point(groups: int, bits: int) -> bytes:
    """Return the zero points of a row that has the middle code everywhere, which is the operators' default."""
    return pack_bytes(torch.full((groups,), 1 << (bits - 1), dtype=torch.uint8), bits).numpy().tobytes()


def interleaved(first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """Put the rows of two weights one after the other in turns: [N, K] and [N, K] -> [2 N, K]."""
    both = concatenate([first, second])

    def mixed(tensor: Tensor) -> Tensor:
        return tensor.view(2, -1, tensor.shape[1]).transpose(0, 1).reshape(tensor.shape)  # [2, N, X] -> [N, 2, X]

    parts = (mixed(both.codes), mixed(both.scale), mixed(both.zero_point))
    return QuantizedWeight(*parts, both.bits, both.symmetric)


def float_columns(weights: Sequence[Tensor], dtype: type) -> Iterator[np.ndarray]:
    """Yield the transpose [K, sum of N] of weights [N, K] stacked along N, some rows at a time."""
    k, n = weights[0].shape[1], sum(w.shape[0] for w in weights)
    step = max(1, TILE // n)
    for start in range(0, k, step):
        tile = torch.cat([w[:, start : start + step] for w in weights])
        yield tile.t().float().contiguous().numpy().astype(dtype, copy=False)
