"""Half-quadratic quantization of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight


class Hqq(Quantizer, sources=("olive.passes.hqq", "olive.passes.streamed", "olive.quant.hqq")):
    """Fit zero points and scales to an error measure that forgives outliers (HQQ, Badri and Shaji, 2023). Needs no
    data."""

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:  # noqa: ARG002
        """Round without data."""
        from olive.quant.hqq import hqq

        return hqq(weight, group.bits, group.group_size, symmetric=self.symmetric)

    def write(self, model: Model, ctx: Context) -> Model:
        from olive.passes.streamed import stream
        from olive.quant.hqq import hqq

        return stream(self, model, ctx, hqq)
