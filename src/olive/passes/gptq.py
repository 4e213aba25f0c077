"""GPTQ quantization of a checkpoint."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from olive.passes.calibrated import Calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight
    from olive.quant.layer import Layer, Results


GPTQ = ("olive.quant.gptq", "olive.quant.awq")
"""The modules that decide what GPTQ gives."""


class Gptq(Calibrated, sources=("olive.passes.gptq", *GPTQ)):
    """Round column by column, each error made up for by the columns that follow and each layer for those before it
    (GPTQ, arXiv 2210.17323, 2022), with ranges clipped where that lowers the output error."""

    refine: int = Field(1, ge=0)
    """Rounds of fitting each weight's scales, then its codes, anew to the layer's output after it is rounded."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean input energy that is added to every channel's, for stability."""

    compensate: bool = False
    """Also make up for what earlier layers' rounding did to a layer's inputs, against the float model's (after GPTAQ,
    arXiv 2504.02692, 2025)."""

    sequential: ClassVar[bool] = True

    @property
    def compares(self) -> bool:
        return self.compensate

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:
        """Round column by column, for the float model's inputs."""
        from olive.quant.gptq import with_ranges

        if gram is None:
            return super().rounded(weight, gram, group)
        return self.rounded_by(partial(with_ranges, damping=self.damping), weight, gram, group)

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Choose ranges, then codes."""
        from olive.quant.gptq import compensate, with_ranges

        if self.compensate:
            layer.compensate(groups, partial(compensate, damping=self.damping))
        return layer.round(groups, partial(with_ranges, damping=self.damping), self.refine)
