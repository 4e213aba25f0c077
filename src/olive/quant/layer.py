"""One decoder layer under quantization: its sites, the statistics of their inputs, and what can be done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.sites import Site, find_sites

Results = dict[str, tuple[QuantizedWeight, float]]
"""By linear: its integers and its relative output error, ||dW x||^2 / ||W x||^2."""


@dataclass
class InputStatistics:
    """What the searches need to know about one input tensor."""

    gram: Tensor
    """float32 [K, K]: sum over tokens of x x^T."""
    absolute: Tensor
    """float32 [K]: sum over tokens of abs(x)."""
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, device: str | torch.device) -> InputStatistics:
        """Start with no tokens."""
        return cls(torch.zeros(k, k, device=device), torch.zeros(k, device=device))

    def add(self, x: Tensor) -> None:
        """Count the rows of ``x`` [..., K]."""
        x = x.reshape(-1, x.shape[-1]).float()  # [B, T, K] -> [B * T, K]
        self.gram.addmm_(x.t(), x)
        self.absolute += x.abs().sum(0)
        self.tokens += len(x)

    def rescale(self, scale: Tensor) -> None:
        """Account for channels divided by ``scale`` [K]."""
        self.gram /= scale[:, None] * scale[None, :]
        self.absolute /= scale

    def mean_gram(self) -> Tensor:
        """Return G = X^T X / T."""
        return self.gram / max(self.tokens, 1)

    def mean_absolute(self) -> Tensor:
        """Return the mean of abs(x) per channel."""
        return self.absolute / max(self.tokens, 1)


def output_error(change: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output change of a weight change: tr(dW G dW^T) for dW [N, K], G [K, K]."""
    return ((change @ gram) * change).sum()


class Rounding(Protocol):
    """A way to quantize one weight [N, K], given the Gram matrix [K, K] of its input."""

    def __call__(
        self, weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool
    ) -> QuantizedWeight: ...


class Layer:
    """A decoder layer. Its forward runs in its own type; all arithmetic on its weights is float32."""

    def __init__(self, block: nn.Module, stored: torch.dtype, symmetric: bool) -> None:
        """``stored``: the type that norms are kept in; ``symmetric``: codes are centred on zero."""
        self.block, self.stored, self.symmetric = block, stored, symmetric
        self.sites: list[Site] = []
        self.statistics: dict[Site, InputStatistics] = {}

    def look(self, probe: Callable[[], Tensor], head_dim: int | None) -> None:
        """Find the sites; ``probe`` runs the layer on a small input."""
        self.sites = find_sites(self.block, probe, head_dim)

    def collect(self, forward: Callable[[], None]) -> None:
        """Gather the statistics of every site's input while ``forward`` runs; then make the weights float32."""
        hooks = []
        for site in self.sites:
            first: Any = self.block.get_submodule(site.linears[0])
            seen = self.statistics[site] = InputStatistics.empty(first.in_features, first.weight.device)
            hooks.append(first.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0])))
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        self.block.float()

    def weight(self, name: str) -> Tensor:
        """Return a linear's weight [N, K]."""
        linear: Any = self.block.get_submodule(name)
        return linear.weight.data

    def scale(self, site: Site, scale: Tensor) -> None:
        """Multiply the columns of a site's readers by ``scale`` [K] and divide their input by it."""
        assert site.fold is not None
        applied = site.fold.apply(self.block, scale, self.stored)
        for name in site.linears:
            self.weight(name).mul_(applied)
        self.statistics[site].rescale(applied)

    def round(self, groups: Mapping[str, Any], rounding: Rounding) -> Results:
        """Quantize every linear that ``groups`` gives bits and a group size."""
        gram_of = {name: self.statistics[site].mean_gram() for site in self.sites for name in site.linears}
        results: Results = {}
        for name, group in groups.items():
            if group is None:
                continue
            weight, settings = self.weight(name), (group.bits, group.group_size)
            if name not in gram_of:  # never ran (an expert that no token reached): no data to go by
                results[name] = (round_to_nearest(weight, *settings, symmetric=self.symmetric), float("nan"))
                continue
            gram = gram_of[name]
            chosen = rounding(weight, gram, *settings, symmetric=self.symmetric)
            error = output_error(chosen.dequantize() - weight, gram) / output_error(weight, gram).clamp(min=1e-12)
            results[name] = (chosen, float(error))
        return results

    def put(self, results: Results, dtype: torch.dtype) -> None:
        """Let the layer compute with its rounded weights, in ``dtype``."""
        for name, (weight, _) in results.items():
            self.weight(name).copy_(weight.dequantize())
        self.block.to(dtype)
