"""Linear layers in the graph: float or integer products, several in one where they allow it, adapters beside them.

Shape letters: B batch, T tokens, N out channels, K in channels, R adapter rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from olive.decoder import weights
from olive.decoder.graph import Graph
from olive.decoder.options import BITS, Options
from olive.quant.affine import QuantizedWeight, concatenate
from olive.quant.formats.checkpoint import Checkpoint

log = logging.getLogger("olive")


@dataclass
class Linears:
    """Adds linear layers to a graph and keeps record of what became of them."""

    graph: Graph
    checkpoint: Checkpoint
    options: Options
    adapted: frozenset[str]
    """Modules of the graph that take adapter inputs."""
    done: Callable[[str], None]
    """Called with each module of the checkpoint that has been written."""
    bits: dict[str, int | str] = field(default_factory=dict)
    """Bits per weight of each module of the checkpoint."""
    fallbacks: dict[str, str] = field(default_factory=dict)
    """Modules that stayed float against what was asked, with the reason."""

    def __call__(self, x: ir.Value, modules: Sequence[str], name: str) -> ir.Value:
        """Add linears of a layer in the precision of the layers."""
        return self.linear(x, modules, name, BITS[self.options.precision])

    def linear(self, x: ir.Value, modules: Sequence[str], name: str, bits: int | None) -> ir.Value:
        """Return the outputs of ``modules`` for ``x`` [B, T, K] side by side [B, T, sum of N]."""
        loaded = [self.load(module, bits) for module in modules]
        biases = [self._bias(module) for module in modules]
        if len(modules) > 1 and not _alike(loaded):
            each = [self._product(x, [w], [b], m) for w, b, m in zip(loaded, biases, modules, strict=True)]
            y = self.graph.op("Concat", each, f"{name}.Concat", {"axis": -1})
        else:
            y = self._product(x, loaded, biases, name)
        for module in modules:
            self.done(module)
        return self._adapter(x, y, name, loaded) if name in self.adapted else y

    def load(self, module: str, bits: int | None, *, recorded_as: str = "") -> Tensor | QuantizedWeight:
        """Return a module's weight: its integers, else rounded to ``bits``, else as it is (None, or no group fits)."""
        name = recorded_as or module
        if module in self.checkpoint.quantized:
            stored = self.checkpoint.quantized_weight(module)
            found = weights.regroup(stored)
            if found is None:
                self._fall_back(name, f"group size {stored.group_size} is not a multiple of 16: kept as float")
                return stored.dequantize()
        else:
            weight = self.checkpoint.weight(f"{module}.weight")
            if bits is None:
                self.bits[name] = "float"
                return weight
            options = self.options
            rounded = weights.round_weight(weight, bits, options.group_size, symmetric=options.symmetric)
            found = rounded and weights.regroup(rounded)
            if found is None:
                self._fall_back(name, f"no group of at least 16 divides {weight.shape[1]} channels: kept as float")
                return weight
        self.bits[name] = found.bits
        return found

    def _fall_back(self, name: str, reason: str) -> None:
        log.warning("%s: %s", name, reason)
        self.bits[name] = "float"
        self.fallbacks[name] = reason

    def _bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self.checkpoint.weight(name).float() if name in self.checkpoint else None

    def _product(
        self, x: ir.Value, parts: Sequence[Tensor | QuantizedWeight], biases: Sequence[Tensor | None], name: str
    ) -> ir.Value:
        bias = _stack_biases(parts, biases)
        offset = None if bias is None else self.graph.weight(f"{name}.bias", bias.numpy())
        integers = [p for p in parts if isinstance(p, QuantizedWeight)]
        if integers:
            stored = self.store(name, concatenate(integers))
            return self.multiply(x, stored, name, bias=offset)
        floats = [p for p in parts if isinstance(p, Tensor)]
        k, n = floats[0].shape[1], sum(p.shape[0] for p in floats)
        weight = self.graph.stream(f"{name}.weight", ir.DataType.FLOAT, (k, n), weights.float_columns(floats))
        y = self.graph.op("MatMul", [x, weight], f"{name}.MatMul")
        return y if offset is None else self.graph.op("Add", [y, offset], f"{name}.Add")

    def store(self, name: str, weight: QuantizedWeight) -> Stored:
        """Write a weight's integers to the data file."""
        codes, scale, zero_point = weights.blocks(weight)
        return Stored(
            weight=self.graph.weight(f"{name}.qweight", codes),
            scales=self.graph.weight(f"{name}.scales", scale),
            zero_points=None if zero_point is None else self.graph.weight(f"{name}.qzeros", zero_point),
            shape=(weight.codes.shape[0], weight.codes.shape[1]),
            bits=weight.bits,
            group_size=weight.group_size,
        )

    def multiply(self, x: ir.Value, stored: Stored, name: str, bias: ir.Value | None = None) -> ir.Value:
        """Return ``x`` [B, T, K] times the stored weight [N, K] transposed."""
        n, k = stored.shape
        inputs = [x, stored.weight, stored.scales, stored.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"K": k, "N": n, "bits": stored.bits, "block_size": stored.group_size,
                      "accuracy_level": self.options.accuracy_level}  # fmt: skip
        return self.graph.op("MatMulNBits", inputs, f"{name}.MatMulNBits", attributes)

    def _adapter(self, x: ir.Value, y: ir.Value, name: str, parts: Sequence[Tensor | QuantizedWeight]) -> ir.Value:
        """Add ``x @ A @ B``; A and B are inputs; their default has rank 0, which costs nothing."""
        n, k = sum(_shape(p)[0] for p in parts), _shape(parts[0])[1]
        rank = f"R.{name}"  # one symbol per module: ranks may differ between modules of one adapter
        a = self.graph.optional_input(f"{name}.lora_A.weight", [k, rank], np.zeros((k, 0), np.float32))
        b = self.graph.optional_input(f"{name}.lora_B.weight", [rank, n], np.zeros((0, n), np.float32))
        low = self.graph.op("MatMul", [x, a], f"{name}.lora_A.MatMul")  # [B, T, K] -> [B, T, R]
        high = self.graph.op("MatMul", [low, b], f"{name}.lora_B.MatMul")  # [B, T, R] -> [B, T, N]
        return self.graph.op("Add", [y, high], f"{name}.lora.Add")


@dataclass(frozen=True)
class Stored:
    """Integers of a weight in the data file."""

    weight: ir.Value
    """uint8 [N, G, S * bits / 8]."""
    scales: ir.Value
    zero_points: ir.Value | None
    shape: tuple[int, int]
    bits: int
    group_size: int


def _shape(part: Tensor | QuantizedWeight) -> tuple[int, int]:
    n, k = part.codes.shape if isinstance(part, QuantizedWeight) else part.shape
    return n, k


def _alike(parts: Sequence[Tensor | QuantizedWeight]) -> bool:
    """Whether weights can be one product: all float, or integers of the same bits and group size."""
    kinds = {(p.bits, p.group_size) if isinstance(p, QuantizedWeight) else None for p in parts}
    return len(kinds) == 1


def _stack_biases(parts: Sequence[Tensor | QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Put biases side by side; a part without one contributes zeros."""
    if all(b is None for b in biases):
        return None
    return torch.cat([torch.zeros(_shape(p)[0]) if b is None else b for p, b in zip(parts, biases, strict=True)])
