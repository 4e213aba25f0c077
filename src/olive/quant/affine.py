"""Affine (scale and zero point) quantization of weights by groups of input channels.

Shape letters: N out channels, K in channels, S group size, G = K / S groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes of a linear layer's weight: ``w = (codes - zero_point) * scale``."""

    codes: Tensor
    """uint8 [N, K], each below 2^bits."""
    scale: Tensor
    """float16 or float32 [N, G]; never 0, negative where the group's largest value is positive (symmetric)."""
    zero_point: Tensor
    """uint8 [N, G]."""
    bits: int
    symmetric: bool

    @property
    def group_size(self) -> int:
        """Input channels that share one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the codes stand for, [N, K]."""
        n, k = self.codes.shape
        grouped = self.codes.view(n, -1, self.group_size).to(torch.float32)  # [N, K] -> [N, G, S]
        weight = (grouped - self.zero_point.unsqueeze(-1)) * self.scale.unsqueeze(-1).float()
        return weight.view(n, k).to(dtype)


def choose_qparams(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point for groups that span ``low`` to ``high`` (any equal shape).

    Asymmetric: the range is widened to hold 0, ``scale = (high - low) / (2^bits - 1)``. Symmetric: the value farthest
    from 0 maps to code 0 (as in ggml's Q4_0), so that all 2^bits codes are used; the scale may be negative. The scale
    is rounded to float16, as it is stored, before codes are chosen, so that rounding to codes absorbs its error.
    """
    levels = 2**bits
    if symmetric:
        farthest = torch.where(high.abs() > low.abs(), high, low)
        scale = _store(farthest / -(levels // 2))
        return scale, torch.full_like(scale, levels // 2, dtype=torch.uint8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _store((high - low) / (levels - 1))
    zero_point = (-low / scale).round().clamp(0, levels - 1)
    return scale, zero_point.to(torch.uint8)


def _store(scale: Tensor) -> Tensor:
    """Round to float16; a scale of 0 (a group of zeros, or underflow) becomes the smallest number above it."""
    info = torch.finfo(torch.float16)
    smallest = info.tiny * info.eps  # subnormal: coarse, but far nearer than the smallest normal number
    scale = scale.clamp(info.min, info.max)
    small = scale.abs() < smallest
    return torch.where(small, torch.where(scale < 0, -smallest, smallest), scale).half().float()


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, symmetric: bool) -> QuantizedWeight:
    """Round ``weight`` [N, K] to the nearest codes of the given scale and zero point [N, G]."""
    n, k = weight.shape
    grouped = weight.float().view(n, scale.shape[1], -1)  # [N, K] -> [N, G, S]
    codes = (grouped / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)
    return QuantizedWeight(codes.to(torch.uint8).view(n, k), scale.half(), zero_point, bits, symmetric)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Quantize ``weight`` [N, K] group by group from its smallest and largest values; needs no data.

    Inside the range the error is at most half a scale.
    """
    n = weight.shape[0]
    grouped = weight.float().view(n, -1, group_size)  # [N, K] -> [N, G, S]
    low, high = grouped.aminmax(dim=-1)
    scale, zero_point = choose_qparams(low, high, bits, symmetric=symmetric)
    return quantize(weight, scale, zero_point, bits, symmetric=symmetric)


def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of the same K, bits and group size along N."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedWeight(
        codes=torch.cat([p.codes for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
        zero_point=torch.cat([p.zero_point for p in parts]),
        bits=parts[0].bits,
        symmetric=all(p.symmetric for p in parts),
    )


def fitting_group(k: int, group_size: int) -> int | None:
    """Return the group size for K input channels: the one asked for (-1: all of K), else the largest power of two
    of at least 16 that divides K and is not above it, else None."""
    if group_size == -1:
        return k
    if k % group_size == 0:
        return group_size
    smaller = 1 << (group_size.bit_length() - 1)
    while smaller >= 16 and k % smaller:
        smaller //= 2
    return smaller if smaller >= 16 else None


def pack_bytes(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 values [..., M] as one stream of bits per row, low bits first: uint8 [..., ceil(M * bits / 8)].

    ``bits`` is 2, 3, 4 or 8; what is left of a row's last byte is 0.
    """
    m = values.shape[-1]
    unit = 8 if bits == 3 else 8 // bits  # so many values fill whole bytes
    parts = torch.nn.functional.pad(values, (0, -m % unit)).unflatten(-1, (-1, unit))  # [..., M] -> [..., M/unit, unit]
    if bits == 3:
        words = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=values.device)
        for i in range(unit):
            words |= parts[..., i].to(torch.int32) << (i * bits)
        packed = torch.stack([(words >> shift).to(torch.uint8) for shift in (0, 8, 16)], dim=-1).flatten(-2)
    else:
        packed = parts[..., 0].clone()
        for i in range(1, unit):
            packed |= parts[..., i] << (i * bits)
    return packed[..., : -(-m * bits // 8)].contiguous()


def unpack_bytes(packed: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Invert :func:`pack_bytes`: uint8 [..., B] to uint8 [..., count], by default all that B bytes hold."""
    count = packed.shape[-1] * 8 // bits if count is None else count
    if bits == 3:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3)).to(torch.int32)
        words = padded[..., 0] | padded[..., 1] << 8 | padded[..., 2] << 16
        parts = [((words >> (i * bits)) & 7).to(torch.uint8) for i in range(8)]
    else:
        parts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count].contiguous()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 values [..., M] low bits first into int32 [..., ceil(M * bits / 32)] (little endian).

    Three bits run on across words, 32 values in 3 words.
    """
    packed = pack_bytes(values, bits)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Invert :func:`pack_bits`: int32 [..., W] to uint8 [..., count], by default all that W words hold."""
    # a word in each row, of a transposed tensor, is contiguous with any stride, and view asks for a stride of 1
    in_bytes = packed.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)  # [..., W] -> [..., 4 W]
    return unpack_bytes(in_bytes, bits, count)
