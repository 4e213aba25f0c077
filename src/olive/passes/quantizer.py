"""What every weight quantizer shares: its options, and what goes into the new checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from olive.data.spec import DataSpec
from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.affine import QuantizedWeight

BITS = {"awq": (4,), "gptq": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 8), "olive": (2, 4, 8)}
"""Bits per weight that each layout holds."""
Table = Literal["float", "int4", "int8"]
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Units of a size, in bytes."""
PER_WEIGHT = "bpw"
"""Unit of a size per quantized weight: bits."""
BUDGET = ("target_size", "kl_budget", "size_of", "sensitivities")
"""The options that ask for an allocation of bits."""
ALLOCATION = (
    "olive.passes.allocate", "olive.passes.held_back", "olive.passes.measured", "olive.passes.sensitivity",
    "olive.passes.calibrated",
    "olive.quant.allocate", "olive.quant.sensitivity", "olive.quant.layer", "olive.quant.sites",
    "olive.quant.statistics", "olive.evaluate", "olive.data",
)  # fmt: skip
"""The modules that decide how bits are allocated."""


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
        "olive.runtime.tensors",
        "olive.runtime.experts",
        "olive.runtime.stored",
        *ALLOCATION,
    ),
    libraries=("torch", "transformers", "tokenizers"),
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
    target_size: str | None = None
    """Size that the checkpoint is to have at most, as in 2.0GB, 900MiB or 4.25bpw (bits per quantized weight, scales
    and zero points included). Bits and group size are then chosen by layer so that the model changes least."""
    kl_budget: float | None = Field(None, gt=0)
    """KL divergence (nats per token) that the checkpoint is to have at most, on rows that are kept from the quantizer.
    Bits and group size are then chosen by layer so that it is smallest."""
    size_of: Literal["checkpoint", "runtime"] = "checkpoint"
    """What target_size and kl_budget count: bytes of the checkpoint, or of its weights in ONNX Runtime's memory."""
    sensitivities: str | None = None
    """File for what each setting would do to the model: written by the first run with target_size or kl_budget, and
    read by later ones with other budgets."""
    data: DataSpec | None = None
    """Data to measure sensitivities on, with target_size or kl_budget. Default: a small shipped text."""

    fitted: ClassVar[bool] = False
    """The quantizer itself looks at the data."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {k: str(v) if isinstance(v, int) else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("target_size")
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(rf"\d+(\.\d+)?({'|'.join([*UNITS, PER_WEIGHT])})", value):
            raise ValueError(f"give a number and a unit ({', '.join(UNITS)} or {PER_WEIGHT}), as in 2.0GB or 4.25bpw")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Quantizer:
        given = [name for name in ("target_size", "kl_budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("target_size, kl_budget: the one is made as small as the other allows; give one of them")
        if given and self.format == "awq":
            raise ValueError(
                f"{given[0]}: the awq layout has one setting for all layers; use format gptq, compressed-tensors or "
                "olive"
            )
        if self.sensitivities is not None and not given:
            raise ValueError("sensitivities: they serve a budget; give target_size or kl_budget too")
        if self.size_of != "checkpoint" and not given:
            raise ValueError("size_of: it says what a budget counts; give target_size or kl_budget too")
        if self.data is not None and not given and not self.fitted:
            raise ValueError("data: this quantizer uses none without target_size or kl_budget; drop it or give one")
        return self

    @property
    def allocates(self) -> bool:
        """Whether bits and group size are chosen by layer."""
        return self.target_size is not None or self.kl_budget is not None

    def run(self, model: Model, ctx: Context) -> Model:
        """Quantize, with bits and group sizes as given or as a budget has them."""
        if not self.allocates:
            return self.write(model, ctx)
        from olive.passes.allocate import allocate

        return allocate(self, model, ctx)

    def write(self, model: Model, ctx: Context) -> Model:
        """Quantize with bits and group sizes as given."""
        raise NotImplementedError

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

    def asked(self, model: Any) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int] | None]]:
        """Return the shape of every linear layer and table that may be quantized, and the bits and group size that the
        options ask for (None: float)."""
        from olive.runtime.layers import decoder_linears

        shapes = {name: (m.out_features, m.in_features) for name, m in decoder_linears(model).items()}
        tables = self.tables(model)
        _check_patterns("exclude", self.exclude, shapes)
        _check_patterns("overrides", (o for o in self.overrides if o not in tables), shapes)
        asked: dict[str, tuple[int, int] | None] = {}
        for name in shapes:
            asked[name] = self._setting(self.own_setting(name) or f"{self.bits}")
            if any(fnmatch(name, pattern) for pattern in self.exclude):
                asked[name] = None
        for name, (shape, bits) in tables.items():
            shapes[name] = shape
            asked[name] = self._setting(self.overrides.get(name) or f"{bits}")
        return shapes, asked

    def fixed(self, name: str, asked: dict[str, tuple[int, int] | None]) -> str | None:
        """Return the setting of a linear layer or table that the options leave no choice in: it is excluded or has an
        override."""
        setting = asked[name]
        if setting is None:
            return "float"
        return f"{setting[0]}:{setting[1]}" if self.own_setting(name) else None

    def rounded(self, weight: Tensor, gram: Tensor | None, group: Any) -> QuantizedWeight:  # noqa: ARG002
        """Return a weight [N, K] about as this quantizer would round it, given the Gram matrix [K, K] of its inputs;
        None for a table, which is rounded without data."""
        from olive.quant.kquant import kquant

        return kquant(weight, group.bits, group.group_size, symmetric=self.symmetric)

    def own_setting(self, linear: str) -> str | None:
        """Return the override of a linear layer, if it has one."""
        fitting = [text for pattern, text in self.overrides.items() if fnmatch(linear, pattern)]
        return fitting[-1] if fitting else None

    def groups(self, model: Any, ctx: Context) -> dict[str, Any]:
        """Choose each linear's bits and group size for a model without weights, and tell the report what fell back."""
        from torch import nn

        from olive.quant.formats.layout import end_of
        from olive.quant.formats.writer import choose_groups

        shapes, asked = self.asked(model)
        groups: dict[str, Any] = {}
        for setting in dict.fromkeys(asked.values()):
            alike = {name: shapes[name] for name in shapes if asked[name] == setting}
            groups |= choose_groups(alike, self.format, *setting) if setting else dict.fromkeys(alike)
        # Routers and vision towers stay float, and config.json has to say so.
        others = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not end_of(name)}
        groups = {name: groups.get(name) for name in (*shapes, *sorted(others - set(shapes)))}
        if not any(groups.values()):
            raise ConfigError(self._why_none(shapes, asked))
        fallbacks = {}
        for name, chosen in groups.items():
            setting = asked.get(name)
            if setting is not None and chosen is None:
                fallbacks[name] = "left float"
            elif setting is not None and setting[1] not in (-1, chosen.group_size):
                fallbacks[name] = f"group size {chosen.group_size}"
        ctx.note(bits={n: g.bits if g else "float" for n, g in groups.items()}, fallbacks=fallbacks)
        return groups

    def _why_none(self, shapes: dict[str, tuple[int, int]], asked: dict[str, Any]) -> str:
        """Say why no layer can be quantized, and with what some could."""
        from olive.quant.formats.writer import choose_groups

        if not any(asked.values()):
            return "exclude: no linear layer is left to quantize; leave some out of the patterns"
        able = [
            f"group_size {size} in format {form}"
            for form in dict.fromkeys((self.format, *BITS))
            for size in (128, 64, 32, 16, -1)
            if self.bits in BITS[form] and any(choose_groups(shapes, form, self.bits, size).values())
        ]
        hint = f"some can with {able[0]}" if able else f"no layout holds them with {self.bits} bits"
        return f"group_size {self.group_size}: no linear layer can be quantized with it in format {self.format}; {hint}"

    def tables(self, model: Any) -> dict[str, tuple[tuple[int, int], int]]:
        """Return shape and bits of the embeddings and the output head as far as they are to be quantized; a tied pair
        is called by the embeddings' name."""
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
    from olive.runtime.layers import skeleton
    from olive.runtime.tensors import open_tensors

    settings = read_config(model.path).get("quantization_config")
    if settings:
        method = settings.get("quant_method")
        way = "with olive dequantize" if method in BITS else "with the tool that made it: olive does not read it"
        raise ConfigError(f"{model.name}: is already quantized ({method}); make it float first, {way}")
    if model.adapters:
        raise ConfigError(f"{model.name}: has an adapter, which quantize would lose; give the base model alone")
    meta = skeleton(model.path, trust_remote_code=model.trust_remote_code)
    return open_tensors(model.path, meta, trust_remote_code=model.trust_remote_code), meta
