"""Olive's own layout: 2, 4 or 8 bits in bytes along the input channels; the only one that holds the embeddings.

Per module [N, K]: ``qweight`` uint8 [N, ceil(K*b/8)], ``scales`` [N, G] and, unless symmetric, ``qzeros`` uint8
[N, ceil(G*b/8)]; low bits first. Group size -1 is one group per output channel; with 0 all of the weight shares one
scale [1, 1]. Source: Olive 0.13 (2026), ``olive/common/quant``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, pack_bytes, unpack_bytes
from olive.quant.formats.layout import End, Grouping, end_of
from olive.quant.formats.shards import Shards

BITS = (2, 4, 8)
ENDS: tuple[End, ...] = ("embeddings", "lm_head")
MIXED = True
PARTS = ("qweight", "scales", "qzeros")


def fits(n: int, k: int, bits: int, group_size: int) -> bool:  # noqa: ARG001
    """Whether a weight can be stored: whole groups of a power of two of at least 16, or one of all channels."""
    if (k * bits) % 8:
        return False
    return group_size == -1 or (group_size >= 16 and group_size.bit_count() == 1 and k % group_size == 0)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay out one weight's integers as Olive's tensors."""
    parts = {"qweight": pack_bytes(weight.codes, weight.bits), "scales": weight.scale.contiguous()}
    return parts if weight.symmetric else parts | {"qzeros": pack_bytes(weight.zero_point, weight.bits)}


def unpack(parts: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> QuantizedWeight:
    """Read one weight's tensors back; ``own`` are the module's settings, overrides applied."""
    bits, scale = own["bits"], parts["scales"]
    codes = unpack_bytes(parts["qweight"], bits)
    symmetric = "qzeros" not in parts
    if symmetric and not own["symmetric"]:
        raise ConfigError(f"{where}: asymmetric by config.json, but without qzeros; fetch the checkpoint again")
    middle = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    zero_point = middle if symmetric else unpack_bytes(parts["qzeros"], bits, scale.shape[1])
    n, groups = codes.shape[0], scale.shape[1]  # one scale for all [1, 1] is repeated for every row
    return QuantizedWeight(
        codes=codes,
        scale=scale.expand(n, groups).contiguous(),
        zero_point=zero_point.expand(n, groups).contiguous(),
        bits=bits,
        symmetric=symmetric,
    )


def shape(module: str, tensors: Shards, own: Mapping[str, Any]) -> tuple[int, int]:
    """Return [N, K] of a stored weight, from headers alone."""
    n, width = tensors.shape(f"{module}.qweight")
    size = own["group_size"]
    return n, tensors.shape(f"{module}.scales")[1] * size if size > 0 else width * 8 // int(own["bits"])


def settings(
    bits: int,
    group_size: int,
    symmetric: bool,
    modules: Mapping[str, Grouping | None],
    *,
    tied: bool = False,
) -> dict[str, Any]:
    """Return config.json's ``quantization_config``; ``modules`` that stay float map to None, and ``tied`` tells that
    lm_head is the embeddings."""
    ends = {end_of(name): chosen for name, chosen in modules.items() if end_of(name)}
    embeddings = ends.get("embeddings") is not None
    overrides: dict[str, dict[str, int]] = {}
    for name, chosen in modules.items():
        if chosen is not None and (chosen.bits, chosen.written_size) != (bits, group_size):
            overrides[name] = {"bits": chosen.bits, "group_size": chosen.written_size}
    kept = [name for name, chosen in modules.items() if chosen is None and not end_of(name)]
    return {
        "quant_method": "olive",
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "lm_head": (embeddings and tied) or ends.get("lm_head") is not None,
        "embeds": embeddings,
        "tie_word_embeddings": embeddings and tied,
        "modules_to_not_convert": kept or None,
        "overrides": overrides or None,
    }


def module_settings(settings: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Apply the override of a module: its name, or ``re:`` and a pattern of the whole name; the longest key counts."""
    found: dict[str, Any] = {}
    for key, override in sorted((settings.get("overrides") or {}).items(), key=lambda item: (len(item[0]), item[0])):
        if key == module or (key.startswith("re:") and re.fullmatch(key.removeprefix("re:"), module)):
            found = override
    return dict(settings) | {key: value for key, value in found.items() if value is not None}


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse bits that are not read."""
    for own in (settings, *(settings.get("overrides") or {}).values()):
        bits = own.get("bits") or settings.get("bits")
        if bits not in BITS:
            raise ConfigError(f"{where}: Olive's layout with {bits!r} bits; only {', '.join(map(str, BITS))} are read")
