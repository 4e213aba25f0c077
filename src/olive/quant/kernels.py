"""The same as :func:`olive.quant.columns.round_run` on a GPU, in one launch. Imports Triton.

Divisions, sums of target and zero point, and rounding are those of IEEE float32, as in PyTorch; a code times a float16
scale is exact, so that a fused multiply-add changes nothing. Only the order in which the errors of up to COLUMNS
columns are summed differs. There are no atomics: the result is the same each time.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from olive.quant.columns import Columns

COLUMNS = 128
"""Columns of one launch."""
ROWS = 8
"""Out channels of one program."""
WARPS = 1
"""Warps of one program: with a single one, the sums over columns need no barrier."""


def round_run(state: Columns, start: int, stop: int) -> None:
    """Round columns ``start`` to ``stop``, at most COLUMNS, one by one."""
    matrices, k, n = state.weight.shape
    with torch.cuda.device_of(state.weight):  # Triton launches on the current device
        _round_run[(triton.cdiv(n, ROWS), matrices)](
            state.weight,
            state.asked,
            state.error,
            state.codes,
            state.lower,
            state.scale,
            state.zero_point,
            state.group,
            n,
            k,
            state.scale.shape[1],
            start,
            stop - start,
            state.top,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )


# One compilation serves every shape: no integer's value is looked at.
@triton.jit(do_not_specialize=["n", "k", "groups", "start", "count", "top"])
def _round_run(
    weight: tl.tensor,
    asked: tl.tensor,
    error: tl.tensor,
    codes: tl.tensor,
    lower: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    group: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    top: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * k + start  # all matrices together may hold more than 2^31 numbers
    errors = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in range(0, count):
        at = (first + i) * n + row
        w = tl.load(weight + at, mask=inside, other=0.0)
        own = tl.program_id(1).to(tl.int64) * groups + tl.load(group + first + i)
        s = tl.load(scale + own * n + row, mask=inside, other=1.0)
        z = tl.load(zero_point + own * n + row, mask=inside, other=0.0)
        share = tl.load(lower + (first + i) * k + start + column, mask=column < i, other=0.0)
        target = tl.load(asked + at, mask=inside, other=0.0) + tl.sum(errors * share[None, :], axis=1) + w
        code = tl.minimum(tl.maximum(tl.div_rn(target, s) + z, 0.0), top.to(tl.float32))
        # Adding 1.5 * 2^23 leaves no bits for a fraction: float32 itself rounds, half to even.
        code = (code + 12582912.0) - 12582912.0
        e = w - (code - z) * s
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
        tl.store(error + at, e, mask=inside)
        errors = tl.where(column[None, :] == i, e[:, None], errors)
