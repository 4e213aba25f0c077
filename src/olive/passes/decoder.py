"""From a Hugging Face decoder checkpoint to a folder for ONNX Runtime GenAI."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from olive.errors import ConfigError
from olive.model import Model, weights_digest
from olive.passes.base import Context, Pass

ADAPTER_FILE = "adapter_weights.onnx_adapter"


class Decoder(
    Pass,
    accepts="hf",
    produces="onnx",
    sources=(
        "olive.passes.decoder",
        "olive.decoder",
        "olive.quant.affine",
        "olive.quant.formats",
        "olive.runtime.adapters",
    ),
    libraries=("onnx", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-genai", "torch"),
    targets=("CPUExecutionProvider",),
):
    """Build the graph of a decoder language model from its config and weights, with adapters as optional inputs.

    Integers of a quantized checkpoint are carried over bit for bit; ``precision`` is for what is float in it.
    """

    precision: Literal["fp32", "int8", "int4"] = "fp32"
    """Precision of the linears that the checkpoint holds as float."""
    group_size: int = Field(32, ge=16, le=256)
    """Input channels that share one scale, where weights are rounded here."""
    symmetric: bool = False
    """Round without zero points."""
    lm_head: Literal["auto", "float", "int8", "int4"] = "auto"
    """Precision of lm_head; auto: int8 if the layers are quantized, else float."""
    embeddings: Literal["auto", "float", "int8", "int4"] = "auto"
    """Precision of the token embeddings; auto: int8 if the layers are quantized, else float."""
    accuracy_level: Literal[0, 4] = 4
    """Activations in products with integer weights: 4 rounds them to int8 (fast), 0 keeps float32."""

    def run(self, model: Model, ctx: Context) -> Model:
        """Write ``model/`` with the graph, the tokenizer and the adapters' files."""
        from olive.decoder import fallback, lora
        from olive.decoder.build import build
        from olive.decoder.families import FAMILIES
        from olive.decoder.options import Options
        from olive.quant.formats.checkpoint import Checkpoint

        checkpoint, out = Checkpoint(model.path), ctx.out / "model"
        if checkpoint.config.get("model_type") not in FAMILIES:
            if model.adapters:
                raise ConfigError(f"{model.path}: model_type {checkpoint.config.get('model_type')!r} is not supported "
                                  f"with adapters; families: {', '.join(FAMILIES)}")  # fmt: skip
            unheeded = {"group_size", "symmetric", "lm_head", "embeddings", "accuracy_level"}
            changed = sorted(unheeded & self.model_dump(exclude_defaults=True).keys())
            if changed:
                raise ConfigError(f"{changed[0]}: GenAI's builder, the fallback for this model, takes precision only")
            ctx.note(**fallback.build(checkpoint, out, self.precision, ctx.scratch))
            return Model("onnx", out)
        digest = weights_digest(model.path)
        for folder in model.adapters.values():
            lora.check_base(folder, digest, str(model.path))
        options = Options(**self.model_dump())
        facts = build(checkpoint, out, options, list(model.adapters.values()), digest, ctx.progress)
        written = {}
        for name, folder in model.adapters.items():
            file = out / (ADAPTER_FILE if len(model.adapters) == 1 else f"{name}.onnx_adapter")
            shapes = lora.convert(folder, out, file)
            facts.setdefault("adapters", {})[name] = {
                "rank": max(shape[1] for tensor, shape in shapes.items() if tensor.endswith(".lora_A.weight")),
                "shapes": shapes,
            }
            written[name] = file
        ctx.note(**facts)
        return Model("onnx", out, written)
