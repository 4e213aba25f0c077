"""Rotations of a decoder's residual stream and of its value heads, folded into the weights.

Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456 (2024); Liu et al.,
"SpinQuant", arXiv 2405.16406 (2024), call the two R1 and R2. That an RMS norm without weights commutes with a rotation
is from Ashkboos et al., "SliceGPT", arXiv 2401.15024 (2024). The model computes the same; outliers of the stream's
channels and of the weights are spread over all channels, so that rounding hurts less. Nothing is added to the graph.

Shape letters: N out channels, K in channels, H heads, D head size. A rotated row vector is x' = x Q. So a weight that
reads x' becomes W Q, one that writes it Q^T W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olive.errors import ConfigError
from olive.quant.sites import Site, find_sites

TILE = 1 << 22
"""Numbers that are rotated at a time, in float64."""


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (H x O) of size K = P M.

    H is Sylvester's Hadamard matrix of size P, the largest power of two that divides K, over sqrt(P); O is orthogonal.
    """

    signs: Tensor
    """float64 [K], each 1 or -1."""
    mix: Tensor
    """float64 [M, M]: O, for the odd part M of K."""

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x`` Q for x [..., K], computed in float64, in x's type."""
        k, m = len(self.signs), len(self.mix)
        signs, mix = self.signs.to(x.device), self.mix.to(x.device)
        rows = x.reshape(-1, k)
        out = torch.empty_like(rows)
        for start in range(0, len(rows), max(1, TILE // k)):
            part = rows[start : start + max(1, TILE // k)].double() * signs
            mixed = part.view(-1, k // m, m) @ mix  # [R, K] -> [R, P, M]
            out[start : start + len(part)] = _hadamard(mixed).view(-1, k)
        return out.view(x.shape)


def _hadamard(x: Tensor) -> Tensor:
    """Multiply ``x`` [R, P, M] along P by Sylvester's Hadamard matrix over sqrt(P), in log2(P) rounds."""
    size = x.shape[1]
    half = 1
    while half < size:
        first, second = x.reshape(len(x), size // (2 * half), 2, -1).unbind(2)
        x = torch.stack((first + second, first - second), dim=2)
        half *= 2
    return x.reshape(len(x), size, -1) / size**0.5


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """Draw a rotation of ``size`` channels: random signs, and an orthogonal factor where size is no power of two."""
    odd = size // (size & -size)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    # With these signs Q is uniform (Haar); for odd = 1 it is 1 or -1.
    return Rotation(signs, q * r.diagonal().sign())


def rotate_layer(
    block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor, rotations: tuple[Rotation, Rotation], where: str
) -> int:
    """Fold the norms of a decoder layer away and rotate it: it then maps x Q to y Q where it mapped x to y.

    ``run(hidden)`` runs the layer on float32 ``hidden`` [B, T, K]; ``rotations``: of the stream (K) and of a head (D).
    Returns how many linears read heads that were rotated. Raises ConfigError, naming ``where``, if the layer does not
    compute the same afterwards.
    """
    stream, head = rotations
    k = hidden.shape[-1]
    sites = find_sites(block, lambda: run(hidden), len(head.signs))
    expected = stream.apply(run(hidden))
    readers = _fold_norms(block, sites, k, where)
    heads = sum(len(site.linears) for site in sites if _rotate_heads(block, site, head, lambda: run(hidden)))
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name in readers:
            module.weight.data = stream.apply(module.weight.data)
        elif module.out_features == k:
            rotate_outputs(module, stream)
    turned = stream.apply(hidden)
    if not same(run(turned), expected, (expected - turned).norm()):
        unread = [n for n, m in _norms(block, k) if n not in {s.fold.module for s in sites if s.fold}]
        what = f"its norm {unread[0]} is not read by linear layers alone" if unread else "its structure does not fit"
        raise ConfigError(
            f"{where} ({type(block).__name__}): rotation is not possible, the layer would compute something else: "
            f"{what}; use a model with RMS norms before attention and MLP, or leave out rotate"
        )
    return heads


def same(found: Tensor, expected: Tensor, moved: Tensor) -> bool:
    """Tell whether two float32 results are equal, as far as rounding allows, measured by a change ``moved`` that a
    mistake would amount to."""
    # A stream with values of 1e4 leaves errors of 1e-3 in every channel.
    return bool((found - expected).norm() <= 1e-3 * moved + 1e-5 * expected.norm())


def norm_gain(norm: nn.Module, where: str) -> tuple[Tensor, float]:
    """Return by what an RMS norm multiplies each channel (float32 [K]) and its weight that would multiply by 1.

    Some norms multiply by their weight, others (Gemma) by 1 + weight: seen by running it on ones. Raises ConfigError
    for a norm that does neither, as one that subtracts the mean.
    """
    module: Any = norm
    weight = module.weight.data.float()
    seen = module(torch.ones(1, 1, len(weight), device=weight.device)).float().flatten()
    for neutral in (1.0, 0.0):
        gain = weight + (1 - neutral)
        if torch.allclose(seen, gain, rtol=1e-3, atol=1e-4):
            return gain, neutral
    raise ConfigError(
        f"{where} ({type(norm).__name__}): rotation is not possible, the norm is not an RMS norm with a weight "
        "(one that subtracts the mean does not commute with rotations); leave out rotate"
    )


def _norms(block: nn.Module, k: int) -> list[tuple[str, nn.Module]]:
    """List the modules that could be norms of the residual stream."""
    weights = ((name, module, getattr(module, "weight", None)) for name, module in block.named_modules())
    return [(name, module) for name, module, weight in weights if weight is not None and weight.shape == (k,)]


def _fold_norms(block: nn.Module, sites: list[Site], k: int, where: str) -> set[str]:
    """Move the norms' weights into the linears that read them; returns those that read the residual stream."""
    norms = dict(_norms(block, k))
    readers: set[str] = set()
    for site in sites:
        if site.fold is None or site.fold.module not in norms:
            continue
        norm: Any = norms[site.fold.module]
        gain, neutral = norm_gain(norm, f"{where}.{site.fold.module}")
        for name in site.linears:
            linear: Any = block.get_submodule(name)
            linear.weight.data = linear.weight.data * gain
        norm.weight.data = torch.full_like(norm.weight.data, neutral)
        readers.update(site.linears)
    return readers


def rotate_outputs(linear: nn.Linear, rotation: Rotation) -> None:
    """Let a linear write a rotated result: Q^T W, and its bias Q^T b."""
    linear.weight.data = rotation.apply(linear.weight.data.t()).t().contiguous()
    if linear.bias is not None:
        linear.bias.data = rotation.apply(linear.bias.data)


def _rotate_heads(block: nn.Module, site: Site, rotation: Rotation, run: Callable[[], Tensor]) -> bool:
    """Rotate each head between a linear that produces heads (v) and those that read them (o), if these are heads.

    Attention only adds up whole value heads; what mixes channels in another way, as the gate of an MLP, is found by
    running the layer, and left as it was.
    """
    fold, size = site.fold, len(rotation.signs)
    if fold is None or fold.kind != "linear" or len(fold.rows) % size:
        return False
    rows = fold.rows.view(-1, size)  # [H, D]; with grouped queries several heads have the same rows
    starts = rows[:, 0].unique()
    if not torch.equal(rows, rows[:, :1] + torch.arange(size)) or bool((starts.diff() < size).any()):
        return False
    producer: Any = block.get_submodule(fold.module)
    linears: list[Any] = [block.get_submodule(name) for name in site.linears]
    saved = {p: p.data for module in (producer, *linears) for p in module.parameters()}
    before = run()
    for linear in linears:
        n, k = linear.weight.shape
        linear.weight.data = rotation.apply(linear.weight.data.view(n, -1, size)).view(n, k)
    moved = (run() - before).norm()
    weight = producer.weight.data.clone()
    bias = None if producer.bias is None else producer.bias.data.clone()
    for start in starts.tolist():
        part = slice(start, start + size)
        weight[part] = rotation.apply(weight[part].t()).t()
        if bias is not None:
            bias[part] = rotation.apply(bias[part])
    producer.weight.data = weight
    if bias is not None:
        producer.bias.data = bias
    if bool((run() - before).norm() <= 1e-2 * moved):
        return True
    for parameter, data in saved.items():
        parameter.data = data
    return False
