"""Quantization to searched ranges, as in ggml's K-quants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context
from olive.passes.calibrated import Calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight
    from olive.quant.layer import Layer, Results


class Kquant(Calibrated, sources=("olive.passes.kquant",)):
    """Round to nearest over ranges that are searched for the least squared error of the weights; with data, each input
    channel's error counts by the energy of its inputs (importance matrix, as in llama.cpp's K-quants, 2023)."""

    data: DataSpec | None = None
    """Data to measure the importance of channels on. Default: none, every channel counts alike."""

    @property
    def looks(self) -> bool:
        return self.data is not None or self.statistics is not None

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Search each group's range."""
        return layer.round(groups, _by_importance, self.refine)

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:
        """Round, by importance if there is data."""
        if gram is None or not self.looks:
            return super().rounded(weight, gram, group)
        return self.rounded_by(_by_importance, weight, gram, group)

    def write(self, model: Model, ctx: Context) -> Model:
        from olive.passes.streamed import stream
        from olive.quant.kquant import kquant

        if not self.looks:
            return stream(self, model, ctx, kquant)
        return super().write(model, ctx)


def _by_importance(weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    from olive.quant.kquant import kquant

    return kquant(weight, bits, group_size, symmetric=symmetric, importance=gram.diagonal())
