"""A linear layer whose weight stays quantized in memory and through which gradients flow to its input.

Shape letters: N out channels, K in channels, G groups; ``...`` are the dimensions of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from olive.quant.affine import QuantizedWeight, pack_bits, unpack_bits


class QuantLinear(nn.Linear):
    """``y = x W^T + bias`` with W dequantized anew for every product; the integers cannot be trained.

    It is an ``nn.Linear`` so that PEFT attaches adapters to it as to any other. Held: ``packed`` int32
    [N, ceil(K*b/32)], ``scale`` float16 [N, G] (its bits as int16), ``zero_point`` uint8 [N, G].
    """

    packed: Tensor
    scale_bits: Tensor
    zero_point: Tensor
    like: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a dense weight
        self.out_features, self.in_features = weight.codes.shape
        self.bits = weight.bits
        self.register_buffer("packed", pack_bits(weight.codes.contiguous(), weight.bits))
        # As integers, because module.to(bfloat16) would round floating buffers.
        self.register_buffer("scale_bits", weight.scale.view(BITS_OF[weight.scale.dtype]))
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("like", torch.empty(0, dtype=dtype))  # follows module.to(), and so says the weight's type
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))

    @property
    def scale(self) -> Tensor:
        """Scales as stored in the checkpoint, [N, G]."""
        return self.scale_bits.view(FLOAT_OF[self.scale_bits.dtype])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the integers stand for, [N, K], computed at each access."""
        return dequantize(self.packed, self.scale, self.zero_point, self.bits, self.in_features).to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.packed, self.scale, self.zero_point, self.bits)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.in_features // self.scale_bits.shape[1]}"


BITS_OF = {torch.float16: torch.int16, torch.float32: torch.int32}
FLOAT_OF = {bits: dtype for dtype, bits in BITS_OF.items()}


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, channels: int) -> Tensor:
    """Return the weight of packed codes, float32 [N, K]; ``channels`` is K, as rows may end in unused bits.

    Equal to ``QuantizedWeight.dequantize``, in a quarter of its time where a byte holds whole codes: they are unpacked
    straight into the result.
    """
    n = packed.shape[0]
    if bits == 3:
        weight = unpack_bits(packed, bits, channels).float()
    else:
        raw, per_byte = packed.view(torch.uint8), 8 // bits  # int32 [N, K*b/32] -> uint8 [N, K*b/8]
        parts = torch.empty(*raw.shape, per_byte, dtype=torch.float32, device=raw.device)
        for i in range(per_byte):
            parts[..., i] = (raw >> (i * bits)) & (2**bits - 1)
        weight = parts.view(n, -1)[:, :channels].contiguous()  # [N, K*b/8, 8/b] -> [N, K]
    grouped = weight.view(n, scale.shape[1], -1)  # [N, K] -> [N, G, S]
    return grouped.sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1).float()).view(n, -1)  # [N, G, S] -> [N, K]


class _Product(torch.autograd.Function):
    """``x W^T``; only the packed tensors are kept for the backward pass, where W is dequantized again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(packed, scale, zero_point)
        ctx.bits, ctx.channels, ctx.dtype = bits, x.shape[-1], x.dtype
        weight = dequantize(packed, scale, zero_point, bits, x.shape[-1]).to(x.dtype)
        return x @ weight.t()  # [..., K] @ [K, N] -> [..., N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        packed, scale, zero_point = ctx.saved_tensors
        weight = dequantize(packed, scale, zero_point, ctx.bits, ctx.channels).to(grad_y.dtype)
        return (grad_y @ weight).to(ctx.dtype), None, None, None, None  # [..., N] @ [N, K] -> [..., K]
