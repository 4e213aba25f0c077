"""Activation-aware weight quantization: scale input channels, then clip, so that rounding hurts the output least.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978 (2023). The paper measures the error
of each candidate by running the layer again. Here it is read off the Gram matrix of the inputs, G = X^T X / T: for a
change dW of a weight, the mean squared change of the output is tr(dW G dW^T), exactly, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olive.quant.affine import QuantizedWeight, choose_qparams, quantize, round_to_nearest
from olive.quant.sites import Site, find_sites

SCALE_GRID = 20
CLIP_GRID = 20
CLIP_TO = 0.5


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


def search_scale(
    weights: list[Tensor],
    statistics: InputStatistics,
    rounded: Callable[[Tensor], QuantizedWeight],
    foldable: Callable[[Tensor], Tensor],
) -> Tensor:
    """Find the channel scale s [K] that minimizes the output error of all ``weights`` [N_i, K] that read one input.

    Candidates are s = a^r / w^(1 - r) for r on a grid, with a the mean activation magnitude and w the mean relative
    weight magnitude per channel, and s = 1. ``rounded`` quantizes a weight; ``foldable`` maps a scale
    to the nearest one that the producer can take.
    """
    gram, activation = statistics.mean_gram(), statistics.mean_absolute().clamp(min=1e-6)
    stacked = torch.cat(weights)
    magnitude = (stacked.abs() / stacked.abs().amax(dim=1, keepdim=True).clamp(min=1e-8)).mean(0).clamp(min=1e-6)
    best, best_error = torch.ones_like(activation), None
    for step in range(-1, SCALE_GRID):
        if step < 0:
            scale = torch.ones_like(activation)
        else:
            ratio = step / SCALE_GRID
            scale = activation**ratio / magnitude ** (1 - ratio)
            scale = foldable((scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4))
        error = sum(output_error(rounded(w * scale).dequantize() / scale - w, gram) for w in weights)
        if torch.isfinite(torch.as_tensor(error)) and (best_error is None or error < best_error):
            best, best_error = scale, error
    return best


def clip_and_round(weight: Tensor, gram: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Quantize ``weight`` [N, K], shrinking each group's range where that lowers its output error.

    The error of one group of one row is dw G_gg dw^T with G_gg [S, S] the group's block of the Gram matrix.
    """
    n, k = weight.shape
    g = k // group_size
    grouped = weight.float().view(n, g, group_size)  # [N, K] -> [N, G, S]
    index = torch.arange(g, device=weight.device)
    blocks = gram.view(g, group_size, g, group_size)[index, :, index]  # [K, K] -> [G, S, S]
    low, high = grouped.aminmax(dim=-1)  # [N, G]
    best_low, best_high, best_error = low, high, torch.full_like(low, torch.inf)
    for step in range(CLIP_GRID):
        shrink = 1 - step * (1 - CLIP_TO) / CLIP_GRID
        scale, zero_point = choose_qparams(low * shrink, high * shrink, bits, symmetric=symmetric)
        change = quantize(weight, scale, zero_point, bits, symmetric=symmetric).dequantize().view(n, g, -1) - grouped
        projected = torch.bmm(change.transpose(0, 1), blocks).transpose(0, 1)  # [G, N, S] x [G, S, S]
        error = (projected * change).sum(-1)  # [N, G]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
    scale, zero_point = choose_qparams(best_low, best_high, bits, symmetric=symmetric)
    return quantize(weight, scale, zero_point, bits, symmetric=symmetric)


def quantize_layer(
    block: nn.Module,
    groups: Mapping[str, Any],
    *,
    symmetric: bool,
    stored: torch.dtype,
    probe: Callable[[], Tensor],
    forward: Callable[[], None],
    head_dim: int | None,
) -> dict[str, tuple[QuantizedWeight, float]]:
    """Quantize one decoder layer's linears; its other parameters are changed in place (float32) where scales fold.

    ``groups`` gives bits and group size per linear (None: stays float), ``probe`` runs the layer on a small input,
    ``forward`` on all calibration data. Returns codes and the relative output error (||dW x||^2 / ||W x||^2) by name.
    """

    def linear(name: str) -> Any:
        return block.get_submodule(name)

    sites = find_sites(block, probe, head_dim)
    statistics = collect(block, sites, forward)
    block.float()
    for site in sites:
        read = [name for name in site.linears if groups.get(name)]
        if site.fold is None or not read:
            continue
        group = groups[read[0]]
        scale = search_scale(
            [linear(name).weight.data for name in read],
            statistics[site],
            partial(round_to_nearest, bits=group.bits, group_size=group.group_size, symmetric=symmetric),
            site.fold.channel_scale,
        )
        scale = site.fold.apply(block, scale, stored)
        for name in site.linears:
            linear(name).weight.data *= scale
        statistics[site].rescale(scale)
    results = {}
    gram_of = {name: statistics[site].mean_gram() for site in sites for name in site.linears}
    for name, group in groups.items():
        if group is None:
            continue
        weight: Tensor = linear(name).weight.data
        if name not in gram_of:  # never ran (an expert that no token reached): no data to go by
            results[name] = (round_to_nearest(weight, group.bits, group.group_size, symmetric=symmetric), float("nan"))
            continue
        gram = gram_of[name]
        chosen = clip_and_round(weight, gram, group.bits, group.group_size, symmetric=symmetric)
        error = output_error(chosen.dequantize() - weight, gram) / output_error(weight, gram).clamp(min=1e-12)
        results[name] = (chosen, float(error))
    return results


def collect(block: nn.Module, sites: list[Site], forward: Callable[[], None]) -> dict[Site, InputStatistics]:
    """Run ``forward`` and gather the statistics of every site's input."""
    statistics, hooks = {}, []
    for site in sites:
        linear: Any = block.get_submodule(site.linears[0])
        statistics[site] = InputStatistics.empty(linear.in_features, linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(lambda _, args, seen=statistics[site]: seen.add(args[0])))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return statistics
