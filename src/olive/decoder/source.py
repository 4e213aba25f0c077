"""A checkpoint's weights under the names and in the layout of the graph, read some rows at a time.

Shape letters: N out channels, K in channels, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from olive.decoder.architecture import Architecture
from olive.quant.affine import QuantizedWeight
from olive.quant.formats.checkpoint import BUFFERS, Checkpoint

SLICE = 1 << 21
"""Weights that are read at once: 4 MB of 16-bit numbers. More is slower, and takes memory on every thread."""
WRAPPERS = ("model.language_model.", "language_model.model.", "language_model.")
"""Where models that also see keep the text decoder."""


@dataclass(frozen=True)
class Expert:
    """A module's rows ``start`` to ``stop`` of the matrix of one expert in a fused tensor."""

    fused: str
    number: int
    start: int
    stop: int


class Source:
    """The text decoder of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, arch: Architecture) -> None:
        self.checkpoint, self.arch = checkpoint, arch
        self.folder = checkpoint.folder
        names = [*checkpoint.float_names, *checkpoint.quantized]
        self._stored = _renamed(names, arch)
        head, table = arch.names.head, arch.names.embeddings
        if arch.tied and not {table, f"{table}.weight"} & self._stored.keys():  # a tied pair is kept under either name
            self._stored = {table + name.removeprefix(head) if name.split(".")[0] == head else name: stored
                            for name, stored in self._stored.items()}  # fmt: skip
        self._experts = _fused_experts(self._stored, checkpoint, arch)
        self.quantized = frozenset(own for own, name in self._stored.items() if name in set(checkpoint.quantized))
        self.left_out = sorted(set(names) - set(self._stored.values()))
        """Tensors of parts that are not the text decoder."""
        linears = {arch.prefix(i) + name for i in range(arch.layers) for name in arch.linears(i)}
        self._transposed = linears if arch.transposed else set()
        qkv = {arch.prefix(i) + name for i in range(arch.layers) for name in arch.names.qkv}
        self._by_head = qkv if arch.qkv_by_head else set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterator[str]:
        """Yield the tensors and quantized modules of the decoder that somebody reads."""
        fused = {expert.fused for expert in self._experts.values()}
        return (name for name in self._stored if not name.endswith(BUFFERS) and name not in fused)

    def has_module(self, module: str) -> bool:
        """Whether a module's weight is there, float or quantized."""
        return module in self.quantized or f"{module}.weight" in self._stored or module in self._experts

    def shape(self, module: str) -> tuple[int, int]:
        """Return [N, K] of a linear layer or a table, without reading its weight."""
        if module in self._experts:
            place = self._experts[module]
            return place.stop - place.start, self.checkpoint.shape(self._stored[place.fused])[2]
        if module in self.quantized:
            return self.checkpoint.linear_shape(self._stored[module])
        n, k = self.checkpoint.shape(self._stored[f"{module}.weight"])
        return (k, n) if module in self._transposed else (n, k)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor as float32: a norm's weight, a bias."""
        tensor = self.checkpoint.weight(self._stored[name]).float()
        return self._ordered(tensor, name.rpartition(".")[0])

    def quantized_weight(self, module: str) -> QuantizedWeight:
        """Return the integers of a quantized module."""
        found = self.checkpoint.quantized_weight(self._stored[module])
        if module not in self._by_head:
            return found
        codes, scale, zero_point = (self._ordered(t, module) for t in (found.codes, found.scale, found.zero_point))
        return replace(found, codes=codes, scale=scale, zero_point=zero_point)

    def slices(self, module: str) -> list[Callable[[], Tensor]]:
        """Return readers of a float weight [N, K], some rows each, in order."""
        n, k = self.shape(module)
        if module in self._transposed or module in self._by_head:
            return [lambda: self._whole(module)]
        step = max(1, SLICE // k)
        return [partial(self._rows, module, start, min(start + step, n)) for start in range(0, n, step)]

    def weight(self, module: str) -> Tensor:
        """Return a whole weight [N, K]: in the type that the checkpoint holds, float32 if it holds integers."""
        if module in self.quantized:
            return self.quantized_weight(module).dequantize()
        return torch.cat([read() for read in self.slices(module)])

    def _rows(self, module: str, start: int, stop: int) -> Tensor:
        if module in self._experts:
            place = self._experts[module]
            (matrix,) = self.checkpoint.rows(self._stored[place.fused], place.number, place.number + 1)
            return matrix[place.start + start : place.start + stop]
        return self.checkpoint.rows(self._stored[f"{module}.weight"], start, stop)

    def _whole(self, module: str) -> Tensor:
        weight = self.checkpoint.weight(self._stored[f"{module}.weight"])
        if module in self._transposed:
            weight = weight.t().contiguous()  # [K, N] -> [N, K]
        return self._ordered(weight, module)

    def _ordered(self, tensor: Tensor, module: str) -> Tensor:
        """Put the rows of queries, keys and values that are stored head by head one kind after the other."""
        if module not in self._by_head:
            return tensor
        apart = tensor.unflatten(0, (self.arch.heads, 3, self.arch.head_dim))  # [N, ...] -> [H, 3, D, ...]
        return apart.transpose(0, 1).flatten(0, 2).contiguous()  # [H, 3, D, ...] -> [N, ...]


def own_name(name: str, arch: Architecture) -> str:
    """Give a tensor the name that it has in a model that is the text decoder alone."""
    wrapper = next((w for w in WRAPPERS if name.startswith(w)), None)
    return name if wrapper is None else arch.names.base + name.removeprefix(wrapper)


def _renamed(names: Iterable[str], arch: Architecture) -> dict[str, str]:
    """Map the names that transformers gives the text decoder to those that the checkpoint has for it."""
    names = list(names)
    wrapper = next((w for w in WRAPPERS if any(name.startswith(w) for name in names)), None)
    base, head = arch.names.base, arch.names.head
    if wrapper is not None:
        heads = {name: head + name.partition(head)[2] for name in names if head in name.split(".")}
        inside = {name: own_name(name, arch) for name in names if name.startswith(wrapper)}
        return {own: name for name, own in (inside | heads).items()}
    if any(name.startswith(base) for name in names):  # transformers 5 calls every head lm_head
        lm_head = {name: head + name.removeprefix("lm_head") for name in names if name.split(".")[0] == "lm_head"}
        return {lm_head.get(name, name): name for name in names}
    return {name if name.startswith(head + ".") else base + name: name for name in names}


def _fused_experts(stored: dict[str, str], checkpoint: Checkpoint, arch: Architecture) -> dict[str, Expert]:
    """Find experts that are stored in one tensor for all: ``gate_up_proj`` [E, 2 I, H] and ``down_proj`` [E, H, I]."""
    found: dict[str, Expert] = {}
    for layer in range(arch.layers):
        if arch.experts is None or not arch.has_experts(layer):
            continue
        prefix = arch.prefix(layer)
        parent = "mlp.experts."  # transformers' own name in every family
        up, down = f"{prefix}{parent}gate_up_proj", f"{prefix}{parent}down_proj"
        if up not in stored or down not in stored:
            continue
        inner, outer = checkpoint.shape(stored[up])[1] // 2, checkpoint.shape(stored[down])[1]
        for i in range(arch.experts.count):
            found[prefix + arch.experts.gate.format(i)] = Expert(up, i, 0, inner)
            found[prefix + arch.experts.up.format(i)] = Expert(up, i, inner, 2 * inner)
            found[prefix + arch.experts.down.format(i)] = Expert(down, i, 0, outer)
    return found
