"""SmoothQuant's preparation of a checkpoint whose activations are to be quantized too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context, Pass
from olive.passes.calibrated import calibration_windows, watched_layers
from olive.passes.quantizer import float_source

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.layer import Layer


class Smooth(
    Pass,
    accepts="hf",
    produces="hf",
    sources=(
        "olive.passes.smooth",
        "olive.passes.calibrated",
        "olive.passes.quantizer",
        "olive.quant.smooth",
        "olive.quant.layer",
        "olive.quant.sites",
        "olive.quant.statistics",
        "olive.quant.formats",
        "olive.runtime",
        "olive.data",
    ),
    libraries=("torch", "transformers", "tokenizers"),
):
    """Make activations easier to quantize to int8: scale the channels of the linear layers' inputs down where they are
    large on calibration data, and the weights that read them up (SmoothQuant, arXiv 2211.10438, 2022). The model
    computes the same. Weights that were scaled are written as float32."""

    data: DataSpec = DataSpec()
    """Calibration data; by default a small shipped text."""
    alpha: float = Field(0.5, ge=0, le=1)
    """How much of the channels' spread moves from the activations into the weights: 1 all of it, 0 the weights' own
    spread into the activations."""

    def run(self, model: Model, ctx: Context) -> Model:
        import torch

        from olive.quant.formats.writer import CheckpointWriter
        from olive.runtime.layers import LayeredModel

        source, meta = float_source(model)
        # What is written comes from the layers that are run, so they are float32; folds are proved to that precision.
        torch.set_float32_matmul_precision("highest")
        layered = LayeredModel(source, meta, dtype=torch.float32, devices=[ctx.compute_device])
        ids = calibration_windows(self.data, model)
        writer = CheckpointWriter(model.path, ctx.out, len(source.float_names))
        peaks: dict[str, tuple[float, float]] = {}
        written: set[str] = set()
        for layer in watched_layers(layered, ids, torch.float32, ctx):
            layer.check()
            for name, tensor in self._scale(layer, peaks).items():
                writer.tensor(name, tensor)
                written.add(name)
        for name in source.float_names:
            if name not in written:
                writer.tensor(name, source.weight(name))
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        writer.close(config | {"dtype": "float32"})
        facts = {name: {"before": round(a, 3), "after": round(b, 3)} for name, (a, b) in peaks.items()}
        ctx.note(calibration_rows=len(ids), calibration_tokens=ids.numel(), largest_over_mean=facts)
        return Model("hf", ctx.out)

    def _scale(self, layer: Layer, peaks: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
        """Scale every input that folds; return the tensors that changed. ``peaks`` gets how far the largest channel of
        each input stands out, before and after."""
        from olive.quant.smooth import smooth_scale

        changed: list[Any] = []
        for site in layer.sites:
            if site.fold is None:
                continue
            statistics = layer.statistics[site]
            before = _peak(statistics.largest())
            weights = [layer.weight(name) for name in site.linears]
            scale = smooth_scale(weights, statistics.largest(), self.alpha)
            layer.scale(site, site.fold.channel_scale(scale))
            peaks[layer.input_name(site)] = before, _peak(statistics.largest())
            changed += [f"{name}.weight" for name in site.linears]
            producer = layer.block.get_submodule(site.fold.module)
            changed += [f"{site.fold.module}.{name}" for name, _ in producer.named_parameters()]
        return {f"{layer.name}.{name}": layer.block.get_parameter(name).data for name in dict.fromkeys(changed)}


def _peak(largest: Tensor) -> float:
    return float(largest.max() / largest.mean().clamp(min=1e-12))
