"""The GPTQ layout: 2, 3, 4 or 8 bits, packed along the input channels; bits and group size per module if need be.

Per linear [N, K]: ``qweight`` int32 [K*b/32, N], ``qzeros`` int32 [G, N*b/32], ``scales`` float16 [G, N] and ``g_idx``
int32 [K] (here always k // S). Three bits run on across words, 32 values in 3 words. ``checkpoint_format`` "gptq"
stores zero points minus one, "gptq_v2" as they are; v1 cannot hold a zero point of 0, so asymmetric weights are written
as v2. Source: AutoGPTQ (2023), GPTQModel (2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, pack_bits, unpack_bits
from olive.quant.formats.layout import End, Grouping, check_order, end_of
from olive.quant.formats.shards import Shards

BITS = (2, 3, 4, 8)
ENDS: tuple[End, ...] = ("lm_head",)
MIXED = True
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = ("gptq", "gptq_v2")


def fits(n: int, k: int, bits: int, group_size: int) -> bool:
    """Whether a linear layer can be stored: whole groups, whole words both ways."""
    return k % (k if group_size == -1 else group_size) == 0 and (n * bits) % 32 == 0 and (k * bits) % 32 == 0


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay out one linear layer's integers as GPTQ tensors (v1 if symmetric, else v2)."""
    stored = weight.zero_point - 1 if weight.symmetric else weight.zero_point
    k = weight.codes.shape[1]
    return {
        "qweight": pack_bits(weight.codes, weight.bits).t().contiguous(),
        "qzeros": pack_bits(stored.t().contiguous(), weight.bits),
        "scales": weight.scale.t().half().contiguous(),
        "g_idx": (torch.arange(k) // weight.group_size).to(torch.int32),
    }


def unpack(parts: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> QuantizedWeight:
    """Read one linear layer's GPTQ tensors back; ``own`` are the module's settings, overrides applied."""
    if "g_idx" in parts:
        check_order(parts["g_idx"], own["group_size"], where)
    bits = own["bits"]
    zero_point = unpack_bits(parts["qzeros"], bits)
    if _version(own) == "gptq":
        zero_point = (zero_point + 1) & (2**bits - 1)
    return QuantizedWeight(
        codes=unpack_bits(parts["qweight"].t(), bits),
        scale=parts["scales"].t().contiguous(),
        zero_point=zero_point.t().contiguous(),
        bits=bits,
        symmetric=own.get("sym", False),
    )


def shape(module: str, tensors: Shards, own: Mapping[str, Any]) -> tuple[int, int]:
    """Return [N, K] of a stored linear layer, from headers alone."""
    n = tensors.shape(f"{module}.scales")[1]
    if f"{module}.g_idx" in tensors:
        return n, tensors.shape(f"{module}.g_idx")[0]
    return n, tensors.shape(f"{module}.qweight")[0] * 32 // int(own["bits"])


def settings(
    bits: int,
    group_size: int,
    symmetric: bool,
    modules: Mapping[str, Grouping | None],
    *,
    tied: bool = False,  # noqa: ARG001
) -> dict[str, Any]:
    """Return config.json's ``quantization_config``; ``modules`` that stay float map to None."""
    dynamic: dict[str, dict[str, Any]] = {}
    head = False
    for name, chosen in modules.items():
        pattern = re.escape(name) + r"(\.|$)"  # GPTQModel looks up modules, GenAI's builder their tensors
        is_head = end_of(name) == "lm_head"
        if chosen is None:
            if not is_head:  # lm_head stays float unless it is asked for
                dynamic["-:" + pattern] = {}
            continue
        head = head or is_head
        if (chosen.bits, chosen.written_size) != (bits, group_size):
            dynamic["+:" + pattern] = {"bits": chosen.bits, "group_size": chosen.written_size}
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": head,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }
    return found | ({"dynamic": dynamic} if dynamic else {})


def module_settings(settings: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Apply the checkpoint's per-module overrides (``dynamic``: regular expressions; "-:" leaves a module float)."""
    own = dict(settings)
    for pattern, override in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return own | override
    return own


def _version(settings: Mapping[str, Any]) -> str:
    """Return "gptq" (v1) or "gptq_v2", which some writers call ``format`` alone."""
    return str(settings.get("checkpoint_format") or settings.get("format") or VERSIONS[0]).lower()


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse bits and versions that are not read."""
    if (version := _version(settings)) not in VERSIONS:
        raise ConfigError(f"{where}: GPTQ in format {version!r}; only {' and '.join(VERSIONS)} are read")
    overrides = [override for override in (settings.get("dynamic") or {}).values() if override]
    for bits in (own.get("bits", settings.get("bits")) for own in (settings, *overrides)):
        if bits not in BITS:
            raise ConfigError(f"{where}: GPTQ with {bits!r} bits; only {', '.join(map(str, BITS))} are read")
