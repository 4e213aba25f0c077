"""A plain float checkpoint from a quantized one."""

from __future__ import annotations

from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass


class Dequantize(
    Pass,
    accepts="hf",
    produces="hf",
    sources=("olive.passes.dequantize", "olive.quant.affine", "olive.quant.formats"),
    libraries=("torch",),
):
    """Write every weight as float32, so that scales and folded norms are not rounded a second time."""

    def run(self, model: Model, ctx: Context) -> Model:
        import torch

        from olive.quant.formats.checkpoint import Checkpoint
        from olive.quant.formats.writer import CheckpointWriter

        source = Checkpoint(model.path)
        if source.method is None:
            raise ConfigError(f"{model.name}: is not quantized; there is nothing to dequantize")
        if model.adapters:
            raise ConfigError(f"{model.name}: has an adapter, which dequantize would lose; give the base model alone")
        names = [*source.float_names, *(f"{module}.weight" for module in source.quantized)]
        writer = CheckpointWriter(model.path, ctx.out, len(names))
        for done, name in enumerate(names):
            tensor = source.weight(name)
            writer.tensor(name, tensor.to(torch.float32) if tensor.is_floating_point() else tensor)
            ctx.progress("dequantize", done + 1, len(names))
        config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "torch_dtype")}
        writer.close(config | {"dtype": "float32"})
        ctx.note(bits=dict.fromkeys(source.quantized, "float"))
        return Model("hf", ctx.out)
