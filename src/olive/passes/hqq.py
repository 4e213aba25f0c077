"""Half-quadratic quantization of a checkpoint."""

from __future__ import annotations

from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer


class Hqq(Quantizer, sources=("olive.passes.hqq", "olive.passes.streamed", "olive.quant.hqq")):
    """Fit zero points and scales to an error measure that forgives outliers (HQQ, Badri and Shaji, 2023). Needs no
    data."""

    def run(self, model: Model, ctx: Context) -> Model:
        from olive.passes.streamed import stream
        from olive.quant.hqq import hqq

        return stream(self, model, ctx, hqq)
