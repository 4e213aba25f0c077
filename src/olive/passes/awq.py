"""Activation-aware quantization of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from olive.passes.calibrated import Calibrated

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight
    from olive.quant.layer import Layer, Results


class Awq(Calibrated, sources=("olive.passes.awq", "olive.quant.awq")):
    """Scale input channels and clip ranges so that rounding changes the layers' outputs least on calibration data (AWQ,
    arXiv 2306.00978, 2023)."""

    format: Literal["awq", "gptq", "compressed-tensors", "olive"] = "awq"
    """Layout of the checkpoint: awq (AWQ GEMM, 4 bits only), gptq, compressed-tensors (pack-quantized) or olive."""

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:
        """Clip and round; the scaling of inputs is left out."""
        from olive.quant.awq import clip_and_round

        if gram is None:
            return super().rounded(weight, gram, group)
        return self.rounded_by(clip_and_round, weight, gram, group)

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Scale where it folds, then clip and round."""
        from olive.quant.awq import clip_and_round, scale_inputs

        scale_inputs(layer, groups)
        return layer.round(groups, clip_and_round, self.refine)
