"""The GPTQ layout: 2, 4 or 8 bits, packed along the input channels, bits and group size per module if need be.

Per linear [N, K]: ``qweight`` int32 [K*b/32, N], ``qzeros`` int32 [G, N*b/32], ``scales`` float16 [G, N] and ``g_idx``
int32 [K] (here always k // S). ``checkpoint_format`` "gptq" stores zero points minus one, "gptq_v2" as they are; v1
cannot hold a zero point of 0, so asymmetric weights are written as v2. Source: AutoGPTQ (2023), GPTQModel (2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, pack_bits, unpack_bits

PARTS = ("qweight", "qzeros", "scales", "g_idx")


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


def unpack(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedWeight:
    """Read one linear layer's GPTQ tensors back; ``settings`` are the module's own, overrides applied."""
    bits = settings["bits"]
    zero_point = unpack_bits(parts["qzeros"], bits)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zero_point = (zero_point + 1) & (2**bits - 1)
    return QuantizedWeight(
        codes=unpack_bits(parts["qweight"].t(), bits),
        scale=parts["scales"].t().contiguous(),
        zero_point=zero_point.t().contiguous(),
        bits=bits,
        symmetric=settings.get("sym", False),
    )


def settings(bits: int, group_size: int, symmetric: bool, modules: Mapping[str, Any]) -> dict:
    """Return config.json's ``quantization_config``; ``modules`` maps every linear to its bits
    and group size (anything with these attributes), or to None where it stays float."""
    dynamic: dict[str, dict[str, int]] = {}
    for name, weight in modules.items():
        pattern = re.escape(name) + "$"
        if weight is None:
            dynamic["-:" + pattern] = {}
        elif group_size != -1 and weight.group_size != group_size:
            dynamic["+:" + pattern] = {"bits": weight.bits, "group_size": weight.group_size}
    found = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }
    return found | ({"dynamic": dynamic} if dynamic else {})


def module_settings(settings: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Apply the checkpoint's per-module overrides (``dynamic``: regular expressions, "-:" leaves a module float)."""
    own = dict(settings)
    for pattern, override in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return own | override
    return own


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse bits that are not read."""
    overrides = [override for override in (settings.get("dynamic") or {}).values() if override]
    for bits in (own.get("bits", settings.get("bits")) for own in (settings, *overrides)):
        if bits not in (2, 4, 8):
            raise ConfigError(f"{where}: GPTQ with {bits!r} bits; only 2, 4 and 8 are read")


def check_order(g_idx: Tensor, group_size: int, where: str) -> None:
    """Refuse activation order: it would need a gather in front of every product."""
    k = len(g_idx)
    size = k if group_size == -1 else group_size
    if not torch.equal(g_idx.long(), torch.arange(k) // size):
        raise ConfigError(f"{where}: GPTQ with activation order (desc_act) is not supported; use static groups")
