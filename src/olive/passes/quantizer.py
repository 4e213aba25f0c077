"""What every weight quantizer shares: its options, and what goes into the new checkpoint."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, Literal

from pydantic import Field, model_validator

from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass


class Quantizer(
    Pass,
    accepts="hf",
    produces="hf",
    sources=("olive.passes.quantizer", "olive.quant.affine", "olive.quant.formats", "olive.runtime.layers"),
    libraries=("torch", "transformers"),
):
    """Base of the quantizers; not a pass by itself."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: int = Field(128, ge=-1)
    """Input channels that share one scale: 16 or more; -1: all of them (one scale per output channel)."""
    symmetric: bool = False
    """Centre the codes on zero instead of fitting a zero point per group."""
    format: Literal["awq", "gptq"] = "gptq"
    """Layout of the checkpoint: awq (AWQ GEMM, 4 bits only) or gptq. Each algorithm has its own default."""
    exclude: tuple[str, ...] = ()
    """Linear layers to leave float, as patterns over their names, for example *.down_proj."""

    @model_validator(mode="after")
    def _possible(self) -> Quantizer:
        if self.group_size != -1 and self.group_size < 16:
            raise ValueError("group_size must be -1 or at least 16")
        if self.format == "awq" and self.bits != 4:
            raise ValueError(f"the awq layout holds 4 bits only, not {self.bits}; use format gptq")
        return self

    def groups(self, shapes: dict[str, tuple[int, int]], ctx: Context) -> dict[str, Any]:
        """Choose each linear's bits and group size, and tell the report what fell back."""
        from olive.quant.formats.writer import choose_groups

        kept = {name for name in shapes if any(fnmatch(name, pattern) for pattern in self.exclude)}
        for pattern in self.exclude:
            if not any(fnmatch(name, pattern) for name in shapes):
                raise ConfigError(f"exclude: no linear layer is named like '{pattern}'; one is '{next(iter(shapes))}'")
        groups = choose_groups(shapes, self.format, self.bits, self.group_size)
        groups |= dict.fromkeys(kept)
        if not any(groups.values()):
            raise ConfigError(
                f"group_size {self.group_size}: no linear layer can be quantized with it; try a smaller one"
            )
        fallbacks = {}
        for name, chosen in groups.items():
            if chosen is None and name not in kept:
                fallbacks[name] = "left float"
            elif chosen is not None and self.group_size not in (-1, chosen.group_size):
                fallbacks[name] = f"group size {chosen.group_size}"
        ctx.note(bits={n: g.bits if g else "float" for n, g in groups.items()}, fallbacks=fallbacks)
        return groups

    def config(self, config: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
        """Return the new checkpoint's config.json."""
        from olive.quant.formats.writer import quantization_config

        own = quantization_config(self.format, self.bits, self.group_size, self.symmetric, groups)
        return config | {"quantization_config": own}


def float_source(model: Model) -> tuple[Any, Any]:
    """Open a float checkpoint's tensors and its model without weights; refuse one that is quantized or adapted."""
    from olive.quant.formats.checkpoint import read_config
    from olive.runtime.layers import open_tensors, skeleton

    settings = read_config(model.path).get("quantization_config")
    if settings:
        method = settings.get("quant_method")
        raise ConfigError(
            f"{model.path.name}: is already quantized ({method}); make it float with olive dequantize first"
        )
    if model.adapters:
        raise ConfigError(f"{model.path.name}: has an adapter, which quantize would lose; give the base model alone")
    meta = skeleton(model.path, trust_remote_code=model.trust_remote_code)
    return open_tensors(model.path, meta, trust_remote_code=model.trust_remote_code), meta
