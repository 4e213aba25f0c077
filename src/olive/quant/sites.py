"""Where a decoder layer's linears get their input, and into what a per-channel scale of that input can be folded.

A *site* is one input tensor and the linears that read it (q, k, v share one; gate and up share one). A scale s of the
input's channels costs nothing if what produces the input can divide its output by s: a norm's weight, or the rows of
an earlier linear (v for o, up for down). Candidates are found by looking, and proved by running: a fold counts only if
the layer's output stays the same. No module names are involved, so new architectures need no table.

Modules of one kind that are numbered side by side (experts) are alike: what is found for one of them holds for all,
also for those that the tokens at hand do not reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Fold:
    """What divides its output channels when an input's channels are scaled."""

    module: str
    kind: str
    """``norm`` (weight), ``norm1`` (1 + weight, as in Gemma) or ``linear`` (rows of the weight, and the bias)."""
    rows: Tensor
    """int64 [K]: the producer's channel behind each input channel; several may share one (grouped queries)."""

    @cached_property
    def shared(self) -> bool:
        """Whether some channels have the same producer."""
        return len(self.rows.unique()) < len(self.rows)

    def channel_scale(self, scale: Tensor) -> Tensor:
        """Average ``scale`` [K] over the channels that share a producer channel, so that it can be folded."""
        if not self.shared:
            return scale
        size = int(self.rows.max()) + 1
        rows = self.rows.to(scale.device)
        total = torch.zeros(size, device=scale.device).index_add_(0, rows, scale.log())
        count = torch.zeros(size, device=scale.device).index_add_(0, rows, torch.ones_like(scale))
        return (total / count.clamp(min=1)).exp()[rows]

    def apply(self, block: nn.Module, scale: Tensor, stored: torch.dtype) -> Tensor:
        """Divide the producer by ``scale`` [K]; returns the scale that was really applied.

        A norm's weight is kept in ``stored`` precision: the scale is adjusted to what that precision can hold.
        """
        module: Any = block.get_submodule(self.module)
        weight: Tensor = module.weight.data
        if self.kind == "linear":
            per_row = torch.ones(weight.shape[0], device=weight.device)
            per_row[self.rows.to(weight.device)] = scale.to(weight.device, torch.float32)
            module.weight.data = (weight.float() / per_row[:, None]).to(weight.dtype)
            if module.bias is not None:
                module.bias.data = (module.bias.data.float() / per_row).to(module.bias.dtype)
            return scale
        shift = 1.0 if self.kind == "norm1" else 0.0
        old = weight.float() + shift
        new = ((old / scale) - shift).to(stored).float()
        applied = torch.where((new + shift != 0) & (old != 0), old / (new + shift), torch.ones_like(old))
        module.weight.data = torch.where(applied == 1, weight.float(), new).to(weight.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias.data = (bias.data.float() / applied).to(bias.dtype)
        return applied


@dataclass(frozen=True, eq=False)
class Site:
    """One input and its readers."""

    linears: tuple[str, ...]
    fold: Fold | None


def find_sites(block: nn.Module, run: Callable[[], Tensor], head_dim: int | None) -> list[Site]:
    """Find the sites of a layer. ``run`` runs it on a small float32 input; ``head_dim`` helps with grouped queries."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    norms = {
        name: m
        for name, m in block.named_modules()
        if not isinstance(m, nn.Linear) and getattr(m, "weight", None) is not None and m.weight.dim() == 1
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs[name], outputs[name] = args[0], out

    hooks = [
        m.register_forward_hook(lambda _, args, out, name=name: record(name, args, out))
        for name, m in (linears | norms).items()
    ]
    try:
        reference = run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[int, int], list[str]] = {}
    for name in linears:
        if name in inputs:
            groups.setdefault((inputs[name].data_ptr(), inputs[name].numel()), []).append(name)
    sites: list[Site] = []
    done: set[str] = set()
    order = list(inputs)  # execution order
    for (pointer, _), names in groups.items():
        if names[0] in done:
            continue
        k = linears[names[0]].in_features
        above = [n for n in norms if n in outputs and outputs[n].data_ptr() == pointer]
        candidates = [Fold(n, kind, torch.arange(k)) for n in above for kind in ("norm", "norm1")]
        if not candidates:
            others = {n for other in _siblings(block, names) for n in linears if n.startswith(other)}
            before = [n for n in order[: order.index(names[0])] if n in linears and n not in {*names, *others}]
            candidates = [
                fold for n in reversed(before) for fold in _row_folds(n, linears[n].out_features, k, head_dim)
            ]
        site = Site(tuple(names), next((f for f in candidates if _proved(block, names, f, run, reference)), None))
        alike = [site, *_for_siblings(block, site, linears)]
        sites += alike
        done |= {name for one in alike for name in one.linears}
    return sites + [Site((name,), None) for name in linears if name not in done]


def _siblings(block: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """If ``names`` all lie in one of several numbered modules of one kind, map the others' prefixes to its own."""
    for match in re.finditer(r"(?<=\.)(\d+)\.", names[0]):
        own, around = names[0][: match.end()], names[0][: match.start() - 1]
        kind = type(block.get_submodule(own[:-1]))
        numbered = [n for n, m in block.get_submodule(around).named_children() if n.isdigit() and type(m) is kind]
        if len(numbered) > 1 and all(name.startswith(own) for name in names):
            return {f"{around}.{n}.": own for n in numbered if f"{around}.{n}." != own}
    return {}


def _for_siblings(block: nn.Module, site: Site, linears: Mapping[str, nn.Linear]) -> Iterator[Site]:
    """Yield the same site of the modules numbered beside the one that ``site`` lies in, where their shapes agree."""
    for other, own in _siblings(block, site.linears).items():
        names = {name: other + name.removeprefix(own) for name in site.linears}
        fold = site.fold
        if fold is not None:  # a producer outside feeds them all: it cannot be scaled for one of them
            inside = fold.module.startswith(own)
            fold = replace(fold, module=other + fold.module.removeprefix(own)) if inside else None
        if all(new in linears and linears[new].weight.shape == linears[old].weight.shape for old, new in names.items()):
            yield Site(tuple(names.values()), fold)


def _row_folds(name: str, n: int, k: int, head_dim: int | None) -> list[Fold]:
    """List the ways in which rows of a linear with ``n`` outputs may feed ``k`` channels: the last k rows (v of a
    packed qkv, up of a packed gate_up), or heads that several queries share."""
    folds = []
    if n >= k:
        folds.append(Fold(name, "linear", torch.arange(n - k, n)))
    if head_dim and k % head_dim == 0:
        heads = k // head_dim
        for shared in (s for s in range(2, heads + 1) if heads % s == 0):
            kept = k // shared
            # As v_proj itself, or as the tail of a packed q, k, v: H + 2 H / shared heads.
            if n == kept or n == k + 2 * kept:
                channel = torch.arange(k)
                rows = (channel // head_dim // shared) * head_dim + channel % head_dim
                folds.append(Fold(name, "linear", rows + (n - kept)))
    return folds


def _proved(block: nn.Module, names: list[str], fold: Fold, run: Callable[[], Tensor], reference: Tensor) -> bool:
    """Scale readers and producer by random factors: the output must stay, though scaling the readers alone moves it."""
    generator = torch.Generator().manual_seed(0)
    scale = fold.channel_scale(torch.empty(len(fold.rows)).uniform_(0.5, 2, generator=generator))
    touched = {p for n in (*names, fold.module) for p in block.get_submodule(n).parameters()}
    saved = {p: p.data for p in touched}
    scale = scale.to(reference.device)
    try:
        for name in names:
            linear: Any = block.get_submodule(name)
            linear.weight.data = (linear.weight.data * scale).to(linear.weight.dtype)
        moved = (run() - reference).norm()
        fold.apply(block, scale, torch.float32)
        kept = (run() - reference).norm()
    except RuntimeError:  # shapes do not meet: not a producer
        return False
    finally:
        for parameter, data in saved.items():
            parameter.data = data
    exact = reference.dtype == torch.float32
    return bool(kept < (1e-3 if exact else 0.1) * moved)
