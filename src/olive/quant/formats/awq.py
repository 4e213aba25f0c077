"""The AWQ GEMM layout: 4 bits, packed along the output channels, one group size for the whole checkpoint.

Per linear [N, K]: ``qweight`` int32 [K, N/8] and ``qzeros`` int32 [G, N/8], eight neighbouring output channels a word
in the order 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` float16 [G, N]. Source: AutoAWQ's WQLinear_GEMM (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, pack_bits, unpack_bits
from olive.quant.formats.layout import End, Grouping
from olive.quant.formats.shards import Shards

BITS = (4,)
ENDS: tuple[End, ...] = ()
MIXED = False
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PLACE = [ORDER.index(i) for i in range(8)]
PARTS = ("qweight", "qzeros", "scales")


def fits(n: int, k: int, bits: int, group_size: int) -> bool:
    """Whether a linear layer can be stored: 4 bits, whole groups, whole words."""
    return bits in BITS and k % (k if group_size == -1 else group_size) == 0 and n % 8 == 0


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay out one linear layer's integers as AWQ tensors."""
    return {
        "qweight": _pack(weight.codes.t()),
        "qzeros": _pack(weight.zero_point.t()),
        "scales": weight.scale.t().half().contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> QuantizedWeight:  # noqa: ARG001
    """Read one linear layer's AWQ tensors back."""
    return QuantizedWeight(
        codes=_unpack(parts["qweight"]).t().contiguous(),
        scale=parts["scales"].t().contiguous(),
        zero_point=_unpack(parts["qzeros"]).t().contiguous(),
        bits=4,
        symmetric=not own.get("zero_point", True),
    )


def _pack(values: Tensor) -> Tensor:
    words = values.reshape(*values.shape[:-1], -1, 8)[..., ORDER]
    return pack_bits(words.flatten(-2), 4)


def _unpack(packed: Tensor) -> Tensor:
    values = unpack_bits(packed, 4)
    return values.view(*values.shape[:-1], -1, 8)[..., PLACE].flatten(-2)


def shape(module: str, tensors: Shards, own: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ARG001
    """Return [N, K] of a stored linear layer, from headers alone."""
    return tensors.shape(f"{module}.scales")[1], tensors.shape(f"{module}.qweight")[0]


def settings(
    bits: int,
    group_size: int,
    symmetric: bool,
    modules: Mapping[str, Grouping | None],
    *,
    tied: bool = False,  # noqa: ARG001
) -> dict[str, Any]:
    """Return config.json's ``quantization_config``; ``modules`` that stay float map to None."""
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": not symmetric,
        "version": "gemm",
        "modules_to_not_convert": list(dict.fromkeys(["lm_head", *(n for n, g in modules.items() if g is None)])),
    }


def module_settings(settings: Mapping[str, Any], module: str) -> dict[str, Any]:  # noqa: ARG001
    """Return the settings of any module: they are those of the checkpoint."""
    return {"bits": 4, **settings}


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse variants of the layout that are not read."""
    named = (settings.get(key) for key in ("version", "format", "checkpoint_format"))  # AutoAWQ's word, GPTQModel's
    version = str(next(filter(None, named), "gemm")).lower()
    if version != "gemm" or settings.get("bits", 4) != 4:
        raise ConfigError(f"{where}: AWQ version {version!r}, {settings.get('bits')} bits; only 'gemm' with 4 is read")
