"""Activation-aware quantization of a checkpoint, one decoder layer in memory at a time."""

from __future__ import annotations

from functools import partial
from typing import Literal

from olive.data.spec import DataSpec
from olive.model import Model
from olive.passes.base import Context
from olive.passes.quantizer import Quantizer, float_source

CALIBRATION_WINDOWS = 128


class Awq(
    Quantizer,
    sources=("olive.passes.awq", "olive.quant.awq", "olive.quant.sites", "olive.data"),
    libraries=("tokenizers",),
):
    """Scale input channels and clip ranges so that rounding to 4 bits changes the layers' outputs least on calibration
    data (AWQ, arXiv 2306.00978, 2023)."""

    bits: Literal[4] = 4
    """Bits per weight; AWQ is for 4."""
    format: Literal["awq", "gptq"] = "awq"
    """Layout of the checkpoint: awq (AWQ GEMM) or gptq."""
    data: DataSpec = DataSpec()
    """Calibration data; by default a small shipped text."""

    def run(self, model: Model, ctx: Context) -> Model:
        import torch

        from olive.data.samples import windows
        from olive.quant.awq import quantize_layer
        from olive.quant.formats.checkpoint import longest
        from olive.quant.formats.writer import CheckpointWriter
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
        stored = source.dtype()
        errors: dict[str, float] = {}
        for index, name, block in layered.layers():
            own = {n.removeprefix(name + "."): g for n, g in groups.items() if n.startswith(name + ".")}
            results = quantize_layer(
                block,
                own,
                symmetric=self.symmetric,
                stored=stored,
                probe=partial(layered.apply, index, block, probe),
                forward=partial(layered.advance, index, block, batches),
                head_dim=layered.head_dim(),
            )
            for module, (weight, error) in results.items():
                writer.quantized(f"{name}.{module}", weight, self.format)
                errors[f"{name}.{module}"] = error
            for parameter, tensor in block.named_parameters():
                if parameter.removesuffix(".weight") not in results:
                    writer.tensor(f"{name}.{parameter}", tensor.to(source.stored_dtype(f"{name}.{parameter}")))
            ctx.progress("quantize", index + 1, len(layered.blocks))
        for name in source.float_names:
            if not name.startswith(layered.prefix + "."):
                writer.tensor(name, source.weight(name))
        writer.close(self.config(source.config, groups))
        ctx.note(relative_output_error={n: round(e, 6) for n, e in errors.items()})
        return Model("hf", ctx.out)
