"""Quantization without data: weights pass through memory some rows at a time, whatever the model's size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from olive.errors import PassError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer, float_source

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight
    from olive.quant.formats.writer import CheckpointWriter

SLICE = 1 << 25
"""Weights that are read at once."""
TILE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Weights that are rounded at once; on a processor their float32 copies (4 MB) should stay in its cache."""


class WeightRounding(Protocol):
    """A way to quantize some rows [N, K] of a weight by themselves."""

    def __call__(self, weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight: ...


def stream(quantizer: Quantizer, model: Model, ctx: Context, rounding: WeightRounding) -> Model:
    """Quantize every linear layer that the options name with ``rounding``."""
    from olive.quant.formats.writer import CheckpointWriter

    source, meta = float_source(model)
    groups = quantizer.groups(meta, ctx)
    writer = CheckpointWriter(model.path, ctx.out, 4 * len(source.float_names))
    for done, name in enumerate(source.float_names):
        _tensor(source, writer, name, groups, quantizer, rounding, ctx.compute_device)
        ctx.progress("quantize", done + 1, len(source.float_names))
    writer.close(quantizer.config(source.config, groups, meta))
    return Model("hf", ctx.out)


def write_rest(
    source: Any, writer: CheckpointWriter, groups: dict[str, Any], prefix: str, quantizer: Quantizer, device: str
) -> None:
    """Write what lies outside the decoder layers: float as it is, or tables rounded to searched ranges."""
    from olive.quant.kquant import kquant

    for name in source.float_names:
        if not name.startswith(prefix + "."):
            _tensor(source, writer, name, groups, quantizer, kquant, device)


def _tensor(
    source: Any,
    writer: CheckpointWriter,
    name: str,
    groups: dict[str, Any],
    quantizer: Quantizer,
    rounding: WeightRounding,
    device: str,
) -> None:
    import torch

    from olive.quant.affine import concatenate
    from olive.quant.formats.shards import ahead

    module = name.removesuffix(".weight")
    group = groups.get(module) if module != name else None
    slices = ahead(_slices(source, name))
    if group is None:
        writer.copy(name, source.stored_dtype(name), source.shape(name), slices)
        return
    parts = []
    for rows in slices:
        for tile in rows.split(max(1, TILE[device] // rows.shape[1])):
            tile = tile.to(device).float()
            if not bool(torch.isfinite(tile.sum())):
                raise PassError(f"{name}: holds NaN or infinity; mend the checkpoint")
            parts.append(rounding(tile, group.bits, group.group_size, symmetric=quantizer.symmetric))
    writer.quantized(module, concatenate(parts), quantizer.format)


def _slices(source: Any, name: str) -> Iterator[Tensor]:
    """Read a tensor some rows at a time."""
    shape = source.shape(name)
    if len(shape) < 2:
        yield source.weight(name)
        return
    step = max(1, SLICE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield source.rows(name, start, min(start + step, shape[0]))
