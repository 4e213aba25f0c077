"""Tune a decoder layer's codes and scales together so that its output stays what it was.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (known as
AutoRound), arXiv 2309.05516 (2023). Each weight gets an offset that is added before rounding, each group a factor of
its scale; both follow the sign of the gradient of the layer's squared output error, with a step that falls to zero.
Here the search starts from codes that are good already (:mod:`olive.quant.gptq`) and keeps them where it finds none
better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olive.quant.affine import QuantizedWeight

if TYPE_CHECKING:
    from olive.quant.layer import Rows

SCALE_RATE = 0.1
"""Step of the scales' relative change against that of the offsets."""
CHECKS = 4
"""How often the error over all rows is measured along the way."""


class TunedLinear(nn.Module):
    """A linear layer that computes with rounded weights and passes gradients to what decides the rounding."""

    def __init__(self, start: QuantizedWeight, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        n, k = weight.shape
        self.bits, self.symmetric, self.bias = start.bits, start.symmetric, bias
        self.scale = start.scale.float().unsqueeze(-1)  # [N, G, 1]
        self.zero_point = start.zero_point.float().unsqueeze(-1)
        near = start.dequantize()
        inside = 0.499 * start.scale.float().abs().repeat_interleave(k // start.scale.shape[1], dim=1)
        # The weight itself where it rounds to the start's code, else the nearest value that does.
        self.target = (near + (weight - near).clamp(-inside, inside)).view(n, start.scale.shape[1], -1)  # [N, G, S]
        self.offset = nn.Parameter(torch.zeros_like(self.target))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def codes(self) -> tuple[Tensor, Tensor]:
        """Return codes [N, G, S], through which gradients pass, and scales [N, G, 1]."""
        scale = self.scale * self.factor
        exact = self.target / scale + self.zero_point + self.offset
        rounded = exact + (exact.round() - exact).detach()
        return rounded.clamp(0, 2**self.bits - 1), scale

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.codes()
        weight = ((codes - self.zero_point) * scale).flatten(1)  # [N, G, S] -> [N, K]
        return functional.linear(x, weight.to(x.dtype), self.bias)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move against the signs of the gradients; an expert that no token reached has none."""
        if self.offset.grad is None or self.factor.grad is None:
            return
        self.offset.sub_(self.offset.grad.sign_(), alpha=rate).clamp_(-0.5, 0.5)
        self.factor.sub_(self.factor.grad.sign_(), alpha=rate * SCALE_RATE).clamp_(0.5, 1.5)
        self.offset.grad = self.factor.grad = None

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Return what is to be stored: float16 scales, and codes rounded under them."""
        scale = (self.scale * self.factor).half().float()
        exact = self.target / (self.scale * self.factor) + self.zero_point + self.offset
        codes = exact.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(1)
        zero_point = self.zero_point.squeeze(-1).to(torch.uint8)
        return QuantizedWeight(codes, scale.squeeze(-1).half(), zero_point, self.bits, self.symmetric)


def tune(
    block: nn.Module,
    start: dict[str, QuantizedWeight],
    rows: Rows,
    *,
    iterations: int,
    rate: float,
) -> dict[str, QuantizedWeight]:
    """Return better integers than ``start`` for the linears of ``block``, or the same.

    ``rate`` is the first step of the offsets, in units of a code.
    """
    dense = {name: block.get_submodule(name) for name in start}
    tuned = {}
    for name, weight in start.items():
        linear: Any = dense[name]
        tuned[name] = TunedLinear(weight, linear.weight.data, linear.bias)
        block.set_submodule(name, tuned[name])
    generator = torch.Generator().manual_seed(rows.seed)
    try:
        best, best_error = start, _error(block, start, tuned, rows)
        for iteration in range(iterations):
            if iteration % rows.batches == 0:
                order = torch.randperm(rows.batches, generator=generator).tolist()
            at = order[iteration % rows.batches]
            rows.tick(iteration / iterations)
            loss = functional.mse_loss(rows.run(at).float(), rows.target(at).float())
            loss.backward()
            for linear in tuned.values():
                linear.step(rate * (1 - iteration / iterations))
            if (iteration + 1) % max(1, iterations // CHECKS) == 0:
                found = {name: linear.result() for name, linear in tuned.items()}
                error = _error(block, found, tuned, rows)
                if error < best_error:
                    best, best_error = found, error
    finally:
        for name, linear in dense.items():
            block.set_submodule(name, linear)
    return best


@torch.no_grad()
def _error(block: nn.Module, weights: dict[str, QuantizedWeight], tuned: dict[str, TunedLinear], rows: Rows) -> float:
    """Squared output error of stored integers over all rows."""
    for name, weight in weights.items():
        n, k = weight.codes.shape
        plain: Any = nn.Linear(k, n, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        plain.bias = tuned[name].bias
        block.set_submodule(name, plain)
    errors = [functional.mse_loss(rows.run(i).float(), rows.target(i).float()) for i in range(rows.batches)]
    for name, linear in tuned.items():
        block.set_submodule(name, linear)
    return float(torch.stack(errors).sum())
