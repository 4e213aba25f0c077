"""What every weight quantizer shares: its options, and what goes into the new checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass

BITS = {"awq": (4,), "gptq": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 8), "olive": (2, 4, 8)}
"""Bits per weight that each layout holds."""
Table = Literal["float", "int4", "int8"]


class Quantizer(
    Pass,
    accepts="hf",
    produces="hf",
    sources=(
        "olive.passes.quantizer",
        "olive.quant.affine",
        "olive.quant.kquant",
        "olive.quant.formats",
        "olive.runtime.layers",
        "olive.runtime.experts",
        "olive.runtime.stored",
    ),
    libraries=("torch", "transformers"),
):
    """Base of the quantizers; not a pass by itself."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: int = Field(128, ge=-1)
    """Input channels that share one scale: 16 or more; -1: all of them (one scale per output channel)."""
    symmetric: bool = False
    """Centre the codes on zero instead of fitting a zero point per group."""
    format: Literal["awq", "gptq", "compressed-tensors", "olive"] = "gptq"
    """Layout of the checkpoint: awq (AWQ GEMM, 4 bits only), gptq, compressed-tensors (pack-quantized) or olive (2, 4,
    8 bits; embeddings too). Each algorithm has its own default."""
    exclude: tuple[str, ...] = ()
    """Linear layers to leave float, as patterns over their names, for example *.down_proj."""
    overrides: dict[str, str] = Field(default_factory=dict)
    """Other bits, or bits:group_size, for linear layers by a pattern over their names; the last that fits counts. For
    example *.down_proj=8 or *.o_proj=4:32."""
    lm_head: Table = "float"
    """Precision of the output head; a head tied to the embeddings is one with them."""
    embeddings: Table = "float"
    """Precision of the token embeddings (format olive only)."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {k: str(v) if isinstance(v, int) else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _possible(self) -> Quantizer:
        settings: dict[str, tuple[int, int]] = {"": (self.bits, self.group_size)}
        for pattern, text in self.overrides.items():
            if not re.fullmatch(r"[2348](:(-1|\d+))?", text):
                raise ValueError(f"overrides: {pattern}={text}: give bits (2, 3, 4, 8) or bits:group_size, as in 8:32")
            settings[f"overrides: {pattern}: "] = self._setting(text)
        tables = {name: int(value[3:]) for name, value in self._tables().items()}
        settings |= {f"{name}: ": (bits, self.group_size) for name, bits in tables.items()}
        for where, (bits, size) in settings.items():
            if size != -1 and size < 16:
                raise ValueError(f"{where}group_size must be -1 or at least 16, not {size}")
            if bits not in BITS[self.format]:
                could = ", ".join(name for name, held in BITS.items() if bits in held)
                raise ValueError(f"{where}the {self.format} layout does not hold {bits} bits; these do: {could}")
        if self.embeddings != "float" and self.format != "olive":
            raise ValueError(f"embeddings: the {self.format} layout keeps them float; use format olive")
        if self.lm_head != "float" and self.format == "awq":
            raise ValueError("lm_head: the awq layout keeps it float; use format gptq, compressed-tensors or olive")
        return self

    def _setting(self, text: str) -> tuple[int, int]:
        bits, _, size = text.partition(":")
        return int(bits), int(size) if size else self.group_size

    def _tables(self) -> dict[str, str]:
        given = {"lm_head": self.lm_head, "embeddings": self.embeddings}
        return {name: value for name, value in given.items() if value != "float"}

    def groups(self, model: Any, ctx: Context) -> dict[str, Any]:
        """Choose each linear's bits and group size for a model without weights, and tell the report what fell back."""
        from torch import nn

        from olive.quant.formats.layout import end_of
        from olive.quant.formats.writer import choose_groups
        from olive.runtime.layers import decoder_linears

        shapes = {name: (m.out_features, m.in_features) for name, m in decoder_linears(model).items()}
        _check_patterns("exclude", self.exclude, shapes)
        _check_patterns("overrides", self.overrides, shapes)
        asked: dict[str, tuple[int, int] | None] = {}
        for name in shapes:
            fitting = [text for pattern, text in self.overrides.items() if fnmatch(name, pattern)]
            kept = any(fnmatch(name, pattern) for pattern in self.exclude)
            asked[name] = None if kept else self._setting(fitting[-1]) if fitting else (self.bits, self.group_size)
        for name, (shape, bits) in self._table_shapes(model).items():
            shapes[name], asked[name] = shape, (bits, self.group_size)
        groups: dict[str, Any] = {}
        for setting in dict.fromkeys(asked.values()):
            alike = {name: shapes[name] for name in shapes if asked[name] == setting}
            groups |= choose_groups(alike, self.format, *setting) if setting else dict.fromkeys(alike)
        # Routers and vision towers stay float, and config.json has to say so.
        others = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not end_of(name)}
        groups = {name: groups.get(name) for name in (*shapes, *sorted(others - set(shapes)))}
        if not any(groups.values()):
            raise ConfigError(
                f"group_size {self.group_size}: no linear layer can be quantized with it; try a smaller one"
            )
        fallbacks = {}
        for name, chosen in groups.items():
            setting = asked.get(name)
            if setting is not None and chosen is None:
                fallbacks[name] = "left float"
            elif setting is not None and setting[1] not in (-1, chosen.group_size):
                fallbacks[name] = f"group size {chosen.group_size}"
        ctx.note(bits={n: g.bits if g else "float" for n, g in groups.items()}, fallbacks=fallbacks)
        return groups

    def _table_shapes(self, model: Any) -> dict[str, tuple[tuple[int, int], int]]:
        """Return shape and bits of the embeddings and the output head as far as they are to be quantized."""
        wanted = {name: int(value[3:]) for name, value in self._tables().items()}
        if not wanted:
            return {}
        modules = {"lm_head": model.get_output_embeddings(), "embeddings": model.get_input_embeddings()}
        names = {role: next(n for n, m in model.named_modules() if m is module) for role, module in modules.items()}
        if _tied(model):
            if self.format != "olive":
                kept = f"which the {self.format} layout keeps float; use format olive"
                raise ConfigError(f"lm_head: it is tied to the embeddings, {kept}")
            if len(set(wanted.values())) > 1:
                raise ConfigError("lm_head, embeddings: they are tied in this model, so give both the same precision")
            wanted = {"embeddings": next(iter(wanted.values()))}
        return {names[role]: (tuple(modules[role].weight.shape), bits) for role, bits in wanted.items()}

    def config(self, config: dict[str, Any], groups: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the new checkpoint's config.json from the old one's and the model without weights."""
        from olive.quant.formats.writer import quantization_config

        setting = (self.format, self.bits, self.group_size, self.symmetric)
        own = quantization_config(*setting, groups, tied=_tied(model))
        return config | {"quantization_config": own}


def _tied(model: Any) -> bool:
    model.tie_weights()
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_patterns(option: str, patterns: Iterable[str], names: dict[str, Any]) -> None:
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ConfigError(f"{option}: no linear layer is named like '{pattern}'; one is '{next(iter(names))}'")


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
