"""Round-to-nearest quantization of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight


class Rtn(Quantizer, sources=("olive.passes.rtn", "olive.passes.streamed")):
    """Round weights to the nearest of 2^bits levels per group, the levels spread from the smallest to the largest
    weight. Needs no data."""

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:  # noqa: ARG002
        """Round without data."""
        from olive.quant.affine import round_to_nearest

        return round_to_nearest(weight, group.bits, group.group_size, symmetric=self.symmetric)

    def write(self, model: Model, ctx: Context) -> Model:
        from olive.passes.streamed import stream
        from olive.quant.affine import round_to_nearest

        return stream(self, model, ctx, round_to_nearest)
