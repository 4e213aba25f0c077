"""What quantizers share that look at calibration data, one decoder layer in memory at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer, float_source

if TYPE_CHECKING:
    from olive.quant.layer import Layer, Results

CALIBRATION_WINDOWS = 128


class Calibrated(
    Quantizer,
    sources=("olive.passes.calibrated", "olive.quant.layer", "olive.quant.sites", "olive.data"),
    libraries=("tokenizers",),
):
    """Base of the quantizers that are fitted to data; not a pass by itself."""

    data: DataSpec = DataSpec()
    """Calibration data; by default a small shipped text."""

    sequential: ClassVar[bool] = False
    """Each layer sees what the layers before it give once they are quantized, so that it can make up for them."""

    def quantize(self, layer: Layer, groups: dict[str, Any]) -> Results:
        """Quantize one layer's linears; ``groups`` gives bits and group size by name, None where one stays float."""
        raise NotImplementedError

    def run(self, model: Model, ctx: Context) -> Model:
        import torch

        from olive.data.samples import windows
        from olive.quant.formats.checkpoint import longest
        from olive.quant.formats.writer import CheckpointWriter
        from olive.quant.layer import Layer
        from olive.runtime.layers import LayeredModel, decoder_linears
        from olive.runtime.torch_model import load_tokenizer

        source, meta = float_source(model)
        shapes = {name: (m.out_features, m.in_features) for name, m in decoder_linears(meta).items()}
        groups = self.groups(shapes, ctx)
        limits = {
            "max_samples": self.data.max_samples or CALIBRATION_WINDOWS,
            "max_seq_len": min(self.data.max_seq_len, longest(source.config)),
        }
        spec = self.data.model_copy(update=limits)
        ids = windows(spec, load_tokenizer(model.path, model.trust_remote_code))
        ctx.note(calibration_rows=len(ids), calibration_tokens=ids.numel())
        on_gpu = ctx.compute_device == "cuda"
        if on_gpu:  # bfloat16 inputs are exact in TF32; the searches compare sums of thousands of products
            torch.set_float32_matmul_precision("high")
        dtype = torch.bfloat16 if on_gpu else torch.float32
        layered = LayeredModel(source, meta, dtype=dtype, device=ctx.compute_device)
        probe = layered.start(ids[:1, :16], 1)[0]
        batches = layered.start(ids, max(1, (16384 if on_gpu else 2048) // ids.shape[1]))
        writer = CheckpointWriter(model.path, ctx.out, 4 * len(source.float_names))
        errors: dict[str, float] = {}
        for index, name, block in layered.layers():
            own = {n.removeprefix(name + "."): g for n, g in groups.items() if n.startswith(name + ".")}
            forward = layered.run_through if self.sequential else layered.advance
            layer = Layer(block, source.dtype(), self.symmetric)
            layer.look(partial(layered.apply, index, block, probe), layered.head_dim())
            layer.collect(partial(forward, index, block, batches))
            results = self.quantize(layer, own)
            for module, (weight, error) in results.items():
                writer.quantized(f"{name}.{module}", weight, self.format)
                errors[f"{name}.{module}"] = error
            for parameter, tensor in block.named_parameters():
                if parameter.removesuffix(".weight") not in results:
                    writer.tensor(f"{name}.{parameter}", tensor.to(source.stored_dtype(f"{name}.{parameter}")))
            if self.sequential:
                layer.put(results, dtype)
                layered.advance(index, block, batches)
            ctx.progress("quantize", index + 1, len(layered.blocks))
        for name in source.float_names:
            if not name.startswith(layered.prefix + "."):
                writer.tensor(name, source.weight(name))
        writer.close(self.config(source.config, groups))
        ctx.note(relative_output_error={n: round(e, 6) for n, e in errors.items()})
        return Model("hf", ctx.out)
