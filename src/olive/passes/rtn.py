"""Round-to-nearest quantization of a checkpoint, streamed tensor by tensor."""

from __future__ import annotations

from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer, float_source


class Rtn(Quantizer, sources=("olive.passes.rtn",)):
    """Round weights to the nearest of 2^bits levels per group, the levels spread from the smallest to the largest
    weight. Needs no data."""

    def run(self, model: Model, ctx: Context) -> Model:
        from olive.quant.affine import round_to_nearest
        from olive.quant.formats.writer import CheckpointWriter
        from olive.runtime.layers import decoder_linears

        source, meta = float_source(model)
        shapes = {name: (m.out_features, m.in_features) for name, m in decoder_linears(meta).items()}
        groups = self.groups(shapes, ctx)
        writer = CheckpointWriter(model.path, ctx.out, 4 * len(source.float_names))
        for done, name in enumerate(source.float_names):
            module = name.removesuffix(".weight")
            weight, group = source.weight(name), groups.get(module)
            if group and name != module:
                weight = weight.to(ctx.compute_device)
                chosen = round_to_nearest(weight, group.bits, group.group_size, symmetric=self.symmetric)
                writer.quantized(module, chosen, self.format)
            else:
                writer.tensor(name, weight)
            ctx.progress("quantize", done + 1, len(source.float_names))
        writer.close(self.config(source.config, groups))
        return Model("hf", ctx.out)
