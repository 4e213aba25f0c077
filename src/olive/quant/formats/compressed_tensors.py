"""The compressed-tensors layout, format pack-quantized: 2, 3, 4 or 8 bits in words along the input channels.

Per linear [N, K]: ``weight_packed`` int32 [N, ceil(K*b/32)], ``weight_scale`` [N, G], ``weight_shape`` int64 [2] and,
unless symmetric, ``weight_zero_point`` int32 [ceil(N*b/32), G], packed along the output channels. The package thinks of
signed codes and adds 2^(b-1) before it packs, so the stored bits are our unsigned codes and zero points; a symmetric
zero point of 0 is our middle code. Values run on across words. Source: the package compressed-tensors 0.20 (2026).
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
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
FORMAT = "pack-quantized"


def fits(n: int, k: int, bits: int, group_size: int) -> bool:  # noqa: ARG001
    """Whether a linear layer can be stored: whole groups; words are filled up."""
    return k % (k if group_size == -1 else group_size) == 0


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay out one linear layer's integers as compressed tensors."""
    parts = {
        "weight_packed": pack_bits(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.symmetric:
        return parts
    return parts | {"weight_zero_point": pack_bits(weight.zero_point.t(), weight.bits).t().contiguous()}


def unpack(parts: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> QuantizedWeight:
    """Read one linear layer's tensors back; ``own`` are the weights' settings in its config group."""
    bits, scale = own["bits"], parts["weight_scale"]
    n, k = (int(size) for size in parts["weight_shape"])
    words = parts["weight_packed"].shape
    if words != (n, -(-k * bits // 32)):  # until June 2026 the package let no 3-bit value cross from word to word
        raise ConfigError(f"{where}: {list(words)} words for [{n}, {k}] codes of {bits} bits, expected "
                          f"{[n, -(-k * bits // 32)]}; save it again with compressed-tensors 0.20")  # fmt: skip
    if "weight_g_idx" in parts:
        check_order(parts["weight_g_idx"], own["group_size"], where)
    if own["symmetric"]:
        zero_point = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    else:
        packed = parts.get("weight_zero_point")
        if packed is None or packed.dtype != torch.int32:
            stored = "none is stored" if packed is None else f"they are stored as {packed.dtype}"
            raise ConfigError(f"{where}: asymmetric, which needs packed int32 zero points, but {stored}; save the "
                              "checkpoint again with compressed-tensors 0.20")  # fmt: skip
        zero_point = unpack_bits(packed.t(), bits, n).t().contiguous()  # [words of N, G] -> [N, G]
    return QuantizedWeight(
        codes=unpack_bits(parts["weight_packed"], bits, k),
        scale=scale,
        zero_point=zero_point,
        bits=bits,
        symmetric=own["symmetric"],
    )


def shape(module: str, tensors: Shards, own: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ARG001
    """Return [N, K] of a stored linear layer; it is a tensor of its own."""
    n, k = tensors[f"{module}.weight_shape"].tolist()
    return n, k


def settings(
    bits: int,
    group_size: int,
    symmetric: bool,
    modules: Mapping[str, Grouping | None],
    *,
    tied: bool = False,  # noqa: ARG001
) -> dict[str, Any]:
    """Return config.json's ``quantization_config``; ``modules`` that stay float map to None.

    One config group takes the linears with the common setting; others name their modules, which goes before. The
    largest group comes first, because transformers 5 reads all experts of a mixture by the first.
    """
    targets: dict[tuple[int, int], list[str]] = {}
    common = 0
    for name, chosen in modules.items():
        if chosen is None:
            continue
        if (chosen.bits, chosen.written_size) == (bits, group_size):
            common += 1
        else:
            targets.setdefault((chosen.bits, chosen.written_size), []).append(name)
    kept = [name for name, chosen in modules.items() if chosen is None]
    if not any(end_of(name) == "lm_head" for name in modules):
        kept.append("lm_head")
    found = [(len(names), key, names) for key, names in targets.items()]
    found = sorted([(common, (bits, group_size), ["Linear"]), *found], key=lambda group: -group[0])
    groups = {
        f"group_{i}": {"targets": names, "weights": _arguments(*key, symmetric), "format": FORMAT}
        for i, (_, key, names) in enumerate(found)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
    }


def _arguments(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    by_channel = group_size == -1
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if by_channel else "group",
        "group_size": None if by_channel else group_size,
        "dynamic": False,
    }


def module_settings(settings: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Return the arguments of the config group that a module belongs to: by its name, else by a pattern (``re:``),
    else as a Linear."""
    groups = list(settings["config_groups"].values())
    patterns = sorted((t, i) for i, group in enumerate(groups) for t in group["targets"] if t.startswith("re:"))
    matched = (groups[i] for t, i in patterns if re.match(t.removeprefix("re:"), module))
    named, classed = (next((g for g in groups if t in g["targets"]), None) for t in (module, "Linear"))
    group = named or next(matched, classed)
    if group is None:
        raise ConfigError(f"config.json: quantization_config: no config group has {module} among its targets")
    arguments = group["weights"]
    size = arguments.get("group_size") or -1
    return {"bits": arguments["num_bits"], "group_size": size, "symmetric": arguments.get("symmetric", True)}


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse other formats of the package, and what changes more than the weights."""
    allowed = f"only {FORMAT} with weights of {', '.join(map(str, BITS))} bits by group or channel is read"
    if settings.get("format") != FORMAT:
        raise ConfigError(f"{where}: compressed-tensors with format {settings.get('format')!r}; {allowed}")
    for key in ("transform_config", "kv_cache_scheme"):
        if settings.get(key):
            raise ConfigError(f"{where}: compressed-tensors with {key}, which is not read; {allowed}")
    groups = settings.get("config_groups") or {}
    if not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError(f"{where}: compressed-tensors without config groups that are written out; {allowed}")
    for name, group in groups.items():
        weights = group.get("weights") or {}
        if group.get("input_activations") or group.get("output_activations"):
            raise ConfigError(f"{where}: config group {name} quantizes activations; {allowed}")
        kind = (weights.get("type", "int"), group.get("format") or FORMAT, weights.get("num_bits"))
        by = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "channel")
        if kind[:2] != ("int", FORMAT) or kind[2] not in BITS or by not in ("group", "channel"):
            raise ConfigError(f"{where}: config group {name} has {kind[2]!r} bits of {kind[0]} by {by} in format "
                              f"{kind[1]}; {allowed}")  # fmt: skip
