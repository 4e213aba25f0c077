"""Tuned quantization of a checkpoint."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from olive.passes.calibrated import Calibrated
from olive.passes.gptq import GPTQ

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight
    from olive.quant.layer import Layer, Results


class Tune(Calibrated, sources=("olive.passes.tune", "olive.quant.tune", *GPTQ)):
    """GPTQ's codes, then rounding and scales of each layer tuned together by signed gradients of its output's error
    (AutoRound, arXiv 2309.05516, 2023). The most accurate of those that hold one layer at a time."""

    iterations: int = Field(100, ge=1)
    """Steps per layer."""
    rate: float = Field(0.0025, gt=0)
    """First step of the offsets that are added before rounding, in units of a code; it falls to 0."""
    refine: int = Field(1, ge=0)
    """Rounds of fitting each weight's scales, then its codes, anew to the layer's output before it is tuned."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean input energy that is added to every channel's, for the stability of GPTQ."""

    sequential: ClassVar[bool] = True
    targeted: ClassVar[bool] = True
    tokens_per_step: ClassVar[int | None] = 4096

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:
        """Round column by column, for the float model's inputs."""
        from olive.quant.gptq import with_ranges

        if gram is None:
            return super().rounded(weight, gram, group)
        return self.rounded_by(partial(with_ranges, damping=self.damping), weight, gram, group)

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Start from GPTQ."""
        from olive.quant.gptq import with_ranges

        start = layer.round(groups, partial(with_ranges, damping=self.damping), self.refine)
        return layer.tune(start, self.iterations, self.rate)
