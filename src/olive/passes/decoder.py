"""From a Hugging Face decoder checkpoint to a folder for ONNX Runtime GenAI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from olive.errors import ConfigError
from olive.model import Model, weights_digest
from olive.passes.base import Context, Pass

if TYPE_CHECKING:
    from olive.decoder.options import Options

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
    libraries=("onnx", "transformers", "tokenizers", "onnx-ir", "onnxruntime", "onnxruntime-genai", "torch"),
    targets=("CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider", "DmlExecutionProvider"),
):
    """Build the graph of a decoder language model from its config and weights, with adapters as optional inputs.

    Integers of a quantized checkpoint are carried over bit for bit; ``precision`` is for what is float in it.
    """

    precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "auto"
    """Precision of the linears that the checkpoint holds as float; auto: fp32 on a CPU, else fp16. On a GPU
    all but fp32 compute in float16."""
    algorithm: Literal["rtn", "kquant", "hqq"] = "rtn"
    """How weights are rounded here: to the nearest code, or with searched scales (slower, more accurate)."""
    group_size: int = Field(128, ge=16, le=256)
    """Input channels that share one scale, where weights are rounded here. Small groups cost bytes, and bytes
    decide the speed."""
    symmetric: bool = False
    """Round without zero points."""
    lm_head: Literal["auto", "float", "int8", "int4"] = "auto"
    """Precision of lm_head; auto: int8 in a quantized checkpoint, else that of the layers."""
    embeddings: Literal["auto", "float", "int8", "int4"] = "auto"
    """Precision of the token embeddings; auto: that of a head tied to them, else int8 if the layers are quantized."""
    accuracy_level: Literal[0, 4] = 4
    """Activations in products with integer weights: 4 rounds them to int8 (fast), 0 keeps float."""
    logits: Literal["all", "last"] = "all"
    """Positions of a prompt that lm_head computes: last is faster and enough to generate, all is needed to score text
    with the graph."""
    kv_cache: Literal["auto", "float32", "float16", "int8"] = "auto"
    """Type of the cached keys and values; auto: that of the computation. int8 takes scales from a short text."""
    context_length: int | None = Field(None, ge=16)
    """Longest text, prompt and answer together; by default all positions that the model has."""
    chunk_size: int | None = Field(None, ge=1)
    """Tokens of a prompt that GenAI reads at once; by default 512."""
    adapter_precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of adapters on a CPU; fp16 halves their memory, but is slower: it is converted for each token. On a GPU
    they are fp16."""

    def run(self, model: Model, ctx: Context) -> Model:
        """Write ``model/`` with the graph, the tokenizer and the adapters' files."""
        from olive.decoder import fallback, lora
        from olive.decoder.build import build
        from olive.decoder.families import FAMILIES, is_built
        from olive.decoder.options import Options
        from olive.quant.formats.checkpoint import Checkpoint

        checkpoint, out = Checkpoint(model.path), ctx.out / "model"
        provider = ctx.target.execution_provider()
        options = Options(**self.model_dump(), provider=provider)
        self._check(provider, options)
        if not is_built(checkpoint.config):
            if model.adapters:
                raise ConfigError(f"{model.path}: model_type {checkpoint.config.get('model_type')!r} is not supported "
                                  f"with adapters; families: {', '.join(FAMILIES)}")  # fmt: skip
            changed = sorted(self.model_dump(exclude_defaults=True).keys() - {"precision"})
            if changed:
                raise ConfigError(f"{changed[0]}: GenAI's builder, the fallback for this model, takes precision only")
            ctx.note(**fallback.build(checkpoint, out, options, ctx.scratch))
            return Model("onnx", out)
        digest = weights_digest(model.path, ctx.digest)
        for folder in model.adapters.values():
            lora.check_base(folder, digest, str(model.path))
        facts = build(checkpoint, out, options, list(model.adapters.values()), digest, ctx.progress)
        written = {}
        for name, folder in model.adapters.items():
            file = out / (ADAPTER_FILE if len(model.adapters) == 1 else f"{name}.onnx_adapter")
            facts.setdefault("adapters", {})[name] = lora.convert(folder, out, file).facts()
            written[name] = file
        ctx.note(**facts)
        return Model("onnx", out, written)

    def _check(self, provider: str, options: Options) -> None:
        """Refuse what the target does not take."""
        if self.precision == "fp16" and not options.target.float16:
            raise ConfigError(f"precision fp16: {provider} computes in float32; use fp32, int8 or int4")
        if (
            self.kv_cache not in ("auto", "float16" if options.float16 else "float32")
            and not options.target.mixed_cache
        ):
            raise ConfigError(f"kv_cache {self.kv_cache}: {provider} keeps the cache in the type that it computes in; "
                              "leave it at auto")  # fmt: skip
