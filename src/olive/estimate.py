"""What a step will need before it runs: memory, disk and time, from the headers of the model's files and from what
steps took here before.

Sizes follow from shapes and bits. The least memory follows from what a pass holds at once: a tensor, a layer with its
calibration rows, the whole model. Nothing is guessed: without an earlier run of the pass there is no time.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olive.data.rows import default_text
from olive.data.spec import DataSpec
from olive.model import Model, files
from olive.passes import pass_name
from olive.passes.base import Pass
from olive.passes.quantizer import PER_WEIGHT, UNITS, Quantizer
from olive.rates import Observation, Rates

ITEM = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4,
        "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}  # fmt: skip
TABLE = re.compile(r"(^|\.)(embed\w*|wte|lm_head|embedding)\.")
LAYER = re.compile(r"^(.*?\.\d+)\.")
CALIBRATION_ROWS = 128
"""Rows that calibrated quantizers use where the data does not say how many."""
BYTES_PER_TOKEN = 16
"""More than any tokenizer takes on average, so that a file's tokens are not overestimated."""


@dataclass(frozen=True)
class Weights:
    """How large a model is: parameters, and the bits that each is stored in."""

    size: int
    """Bytes of the weights' files."""
    linear: int = 0
    """Parameters of the decoder layers' matrices."""
    tables: int = 0
    """Parameters of the embeddings and the output head."""
    rest: int = 0
    linear_bits: float = 16
    table_bits: float = 16
    rest_bits: float = 16
    layer: int = 0
    """Parameters of the largest layer."""
    tensor: int = 0
    """Parameters of the largest tensor."""
    widest: int = 0
    """In channels of the widest matrix of a layer."""
    hidden: int = 0
    tied: bool = False
    """The output head is the embeddings' table."""
    rotary: int = 0
    """Bytes of a graph's rotary tables."""
    other: int = 0
    """Bytes of files that are no weights."""

    def stored(self) -> Weights:
        """Return the same with ``size`` as parameters and bits say."""
        bits = self.linear * self.linear_bits + self.tables * self.table_bits + self.rest * self.rest_bits
        return replace(self, size=int(bits / 8) + self.other)


@dataclass(frozen=True)
class Need:
    """What a step takes."""

    least_memory: int
    """Bytes that it holds at least."""
    disk: int
    """Bytes that it writes."""
    memory: int | None = None
    """Bytes that the process will have, by an earlier run of the pass here."""
    seconds: float | None = None
    like: Observation | None = None
    """The earlier run."""
    same_options: bool = False


def weights(model: Model) -> Weights:
    """Read the sizes of a model from the headers of its files."""
    size = sum((model.path / name).stat().st_size for name in files(model.path))
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(model.path.glob("*.safetensors")):
        tensors |= _header(path)
    config = _json(model.path / "config.json")
    text: dict[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    hidden = int(text.get("hidden_size") or 0)
    head = text.get("head_dim") or hidden // int(text.get("num_attention_heads") or 1)
    bits = (config.get("quantization_config") or {}).get("bits")
    found = {"linear": 0, "tables": 0, "rest": 0}
    stored = dict.fromkeys(found, 0.0)
    layers: dict[str, int] = {}
    widest, tensor = 0, 0
    for name, (dtype, shape) in tensors.items():
        item = ITEM.get(dtype, 4)
        count = 1
        for length in shape:
            count *= length
        packed = dtype in ("I32", "U8", "I64") and len(shape) > 1 and isinstance(bits, int) and 0 < bits <= 8
        params = count * item * 8 // bits if packed and isinstance(bits, int) else count
        in_layer = LAYER.match(name)
        role = "tables" if TABLE.search(name) else "linear" if in_layer and len(shape) > 1 else "rest"
        found[role] += params
        stored[role] += count * item * 8
        tensor = max(tensor, params)
        if in_layer:
            layers[in_layer[1]] = layers.get(in_layer[1], 0) + params
        if role == "linear" and not packed:
            widest = max(widest, shape[-1])
    average = {role: stored[role] / found[role] if found[role] else 16.0 for role in found}
    return Weights(
        size=size,
        other=max(0, size - int(sum(stored.values()) / 8)),
        **found,
        linear_bits=average["linear"],
        table_bits=average["tables"],
        rest_bits=average["rest"],
        layer=max(layers.values(), default=0),
        tensor=tensor,
        widest=widest,
        hidden=hidden,
        tied=bool(text.get("tie_word_embeddings")),
        rotary=4 * int(text.get("max_position_embeddings") or 0) * int(head),
    )


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return type and shape of each tensor of a safetensors file; of a damaged one none: the pass reports it better."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
            return {n: (t["dtype"], t["shape"]) for n, t in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def after(step: Pass, before: Weights, provider: str) -> Weights:
    """Return the sizes of what a pass makes of a model that will run with ``provider``."""
    name = pass_name(step)
    if isinstance(step, Quantizer):
        tables = _table_bits(step.lm_head, step.embeddings, before.table_bits, step.group_size)
        floats = replace(before, linear_bits=0, table_bits=tables).stored()
        bits = step.bits + _overhead(step.bits, step.group_size)
        if step.target_size is not None:
            bits = min(_target_bits(step.target_size, floats), before.linear_bits)
        return replace(floats, linear_bits=bits).stored()
    if name in ("rotate", "dequantize"):
        untied = name == "rotate" and before.tied
        float32 = replace(before, linear_bits=32, table_bits=32, rest_bits=32, tied=before.tied and not untied)
        return replace(float32, tables=2 * before.tables if untied else before.tables).stored()
    if name == "smooth":
        return replace(before, linear_bits=32).stored()
    if name == "decoder":
        return _graph(step.model_dump(), before, provider)
    return before


def _target_bits(target: str, floats: Weights) -> float:
    """Return the bits per weight that a size leaves to the linear layers of a model."""
    number, unit = re.fullmatch(r"([\d.]+)(\D+)", target).groups()  # type: ignore[union-attr]  # the pass has checked it
    if unit == PER_WEIGHT:
        return float(number)
    return max(0.0, 8 * (float(number) * UNITS[unit] - floats.size) / max(1, floats.linear))


def _graph(options: dict[str, Any], before: Weights, provider: str) -> Weights:
    """Return the sizes of a graph: integers are carried over, floats rounded as asked."""
    precision, size = options["precision"], options["group_size"]
    wide = 32 if precision == "fp32" or provider == "CPUExecutionProvider" else 16
    linear = before.linear_bits
    if linear >= 16:
        linear = int(precision[3:]) + _overhead(int(precision[3:]), size, wide) if precision.startswith("int") else wide
    head = "int8" if before.linear_bits < 16 else precision if precision.startswith("int") else "float"
    head = head if options["lm_head"] == "auto" else options["lm_head"]
    rows = head if before.tied else "int8" if linear < 16 else "float"
    rows = rows if options["embeddings"] == "auto" else options["embeddings"]
    tables = _table_bits(head, rows, wide, size, wide)
    other = before.other + before.rotary * wide // 32
    return replace(before, linear_bits=linear, table_bits=tables, rest_bits=wide, other=other).stored()


def _table_bits(lm_head: str, embeddings: str, kept: float, group_size: int, scale: int = 16) -> float:
    """Return the mean bits of two tables of equal size; a float one has ``kept``."""
    bits = [
        kept if t == "float" else int(t[3:]) + _overhead(int(t[3:]), group_size, scale) for t in (lm_head, embeddings)
    ]
    return sum(bits) / 2


def _overhead(bits: int, group_size: int, scale: int = 16) -> float:
    """Return the bits per weight of a scale and a zero point for each group."""
    return 0.0 if group_size == -1 else (scale + bits) / group_size


def least_memory(step: Pass, before: Weights, device: str) -> int:
    """Return the bytes that a pass holds at once, at least, on the host."""
    name = pass_name(step)
    if name == "lora" and device == "cpu":
        return before.size if before.linear_bits < 16 else 4 * (before.linear + before.tables + before.rest)
    if name == "distill":  # two models in float32; Adam has two moments, and the backward pass needs two copies
        return 4 * (2 * (before.linear + before.tables + before.rest) + (4 * before.linear if device == "cpu" else 0))
    data = getattr(step, "data", None)
    if name != "lora" and data is not None and device == "cpu":
        return 4 * (before.layer + before.widest**2 + _tokens(data) * before.hidden)
    return 4 * (before.layer if name == "rotate" else min(before.tensor, 1 << 25))


def _tokens(data: DataSpec) -> int:
    """Return how many tokens of calibration data there are at least."""
    if data.name == "text" and not data.files:
        there = len(default_text())
    else:
        there = sum(Path(file).stat().st_size for file in data.files if Path(file).is_file())
    return min((data.max_samples or CALIBRATION_ROWS) * data.max_seq_len, there // BYTES_PER_TOKEN)


def need(step: Pass, before: Weights, written: int, device: str, rates: Rates) -> Need:
    """Estimate what a step takes that writes a model of ``written`` bytes."""
    least = least_memory(step, before, device)
    name, options = pass_name(step), options_digest(step)
    written = 0 if name == "lora" else written
    like = rates.nearest(name, device, options, before.size)
    if like is None:
        return Need(least, written)
    return Need(
        least,
        written,
        memory=max(least, like.peak + least - like.least),
        seconds=like.seconds * before.size / max(1, like.input_bytes),
        like=like,
        same_options=like.options == options,
    )


def observe(step: Pass, before: Weights, device: str, seconds: float, peak: int) -> Observation:
    """Return what a step took, for later estimates."""
    least = least_memory(step, before, device)
    return Observation(pass_name(step), device, options_digest(step), before.size, round(seconds, 3), peak, least)


def options_digest(step: Pass) -> str:
    """Digest a pass's options."""
    return hashlib.sha256(json.dumps(step.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]
