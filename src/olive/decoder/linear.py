"""Linear layers in the graph: float or integer products, several in one where they allow it, adapters beside them.

Shape letters: B batch, T tokens, N out channels, K in channels, R adapter rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from olive.decoder import weights
from olive.decoder.graph import Graph
from olive.decoder.options import Options
from olive.decoder.source import Source
from olive.errors import PassError
from olive.quant.affine import QuantizedWeight, concatenate, fitting_group, round_to_nearest
from olive.quant.hqq import hqq
from olive.quant.kquant import kquant

log = logging.getLogger("olive")

ROUNDING = {"rtn": round_to_nearest, "kquant": kquant, "hqq": hqq}


@dataclass(frozen=True)
class Part:
    """What is known of a module's weight before it is read."""

    module: str
    n: int
    k: int
    bits: int | None = None
    """Of its integers in the graph; None: it is float there."""
    block: int = 0
    """Input channels that share one scale in the graph."""
    group_size: int = 0
    """Likewise, where the weight is rounded here."""
    held: QuantizedWeight | None = None
    """Integers that the checkpoint holds."""


@dataclass(frozen=True)
class Stored:
    """Integers of a weight in the data file."""

    weight: ir.Value
    """uint8 [N, G, S * bits / 8]."""
    scales: ir.Value
    zero_points: ir.Value | None
    shape: tuple[int, int]
    bits: int
    block: int


@dataclass
class Linears:
    """Adds linear layers to a graph and keeps record of what became of them."""

    graph: Graph
    source: Source
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
        return self.linear(x, modules, name, self.options.layer_bits)

    def linear(self, x: ir.Value, modules: Sequence[str], name: str, bits: int | None) -> ir.Value:
        """Return the outputs of ``modules`` for ``x`` [B, T, K] side by side [B, T, sum of N]; in a graph with adapters
        the first two axes of both are one."""
        parts = [self.part(module, bits) for module in modules]
        if len({(part.bits, part.block) for part in parts}) > 1:  # not alike: a product each
            each = [self._product(x, [part], part.module) for part in parts]
            y = self.graph.op("Concat", each, f"{name}.Concat", {"axis": -1})
        else:
            y = self._product(x, parts, name)
        for module in modules:
            self.done(module)
        return self._adapter(x, y, name, parts) if name in self.adapted else y

    def part(self, module: str, bits: int | None, *, recorded_as: str = "", group_size: int | None = None) -> Part:
        """Decide how a module stands in the graph: by its integers, else rounded to ``bits``, else as it is.

        ``group_size``: asked for in place of that of the options.
        """
        name, (n, k) = recorded_as or module, self.source.shape(module)
        if module in self.source.quantized:
            stored = self.source.quantized_weight(module)
            held = weights.regroup(stored)
            if held is None:
                self.fall_back(name, f"group size {stored.group_size} is not a multiple of 16: kept as float")
                return Part(module, n, k, held=stored)
            self.bits[name] = held.bits
            return Part(module, n, k, held.bits, held.group_size, held=held)
        size = fitting_group(k, group_size or self.options.group_size)
        block = size and weights.block_size(size)
        if bits is None:
            self.bits[name] = "float"
        elif size is None or block is None:
            self.fall_back(name, f"no group of at least 16 divides {k} channels: kept as float")
        else:
            self.bits[name] = bits
            return Part(module, n, k, bits, block, size)
        return Part(module, n, k)

    def fall_back(self, name: str, reason: str) -> None:
        """Record a module that stays float against what was asked."""
        log.warning("%s: %s", name, reason)
        self.bits[name] = "float"
        self.fallbacks[name] = reason

    def integers(self, part: Part) -> Iterator[Callable[[], QuantizedWeight]]:
        """Yield jobs that read and round a part's weight, some rows each, in order."""
        if part.held is not None:
            held = part.held
            yield lambda: held
            return
        for read in self.source.slices(part.module):
            yield partial(self._round, part, read)

    def _round(self, part: Part, read: Callable[[], Tensor]) -> QuantizedWeight:
        rounding, found = ROUNDING[self.options.algorithm], []
        for rows in weights.row_tiles(read()):
            tile = rows.float()
            if not bool(torch.isfinite(tile.sum())):
                raise PassError(f"{part.module}: holds NaN or infinity; mend the checkpoint")
            assert part.bits is not None
            rounded = weights.regroup(rounding(tile, part.bits, part.group_size, symmetric=self.options.symmetric))
            assert rounded is not None
            found.append(rounded)
        return concatenate(found)

    def floats(self, part: Part) -> Tensor:
        """Return a whole float weight [N, K]."""
        return self.source.weight(part.module) if part.held is None else part.held.dequantize()

    def _product(self, x: ir.Value, parts: Sequence[Part], name: str) -> ir.Value:
        bias = self._biases(parts)
        offset = None if bias is None else self.graph.weight(f"{name}.bias", bias.numpy())
        if parts[0].bits is not None:
            return self.multiply(x, self.store(name, parts), name, bias=offset)
        k, n = parts[0].k, sum(part.n for part in parts)
        loaded = [self.floats(part) for part in parts]
        chunks = weights.float_columns(loaded, self.graph.dtype.numpy().type)
        weight = self.graph.stream(f"{name}.weight", self.graph.dtype, (k, n), chunks)
        y = self.graph.op("MatMul", [x, weight], f"{name}.MatMul")
        return y if offset is None else self.graph.op("Add", [y, offset], f"{name}.Add")

    def _biases(self, parts: Sequence[Part]) -> Tensor | None:
        """Put biases side by side; a part without one contributes zeros."""
        names = [f"{part.module}.bias" for part in parts]
        if not any(name in self.source for name in names):
            return None
        found = [self.source.tensor(name) if name in self.source else torch.zeros(part.n)
                 for name, part in zip(names, parts, strict=True)]  # fmt: skip
        return torch.cat(found)

    def store(self, name: str, parts: Sequence[Part]) -> Stored:
        """Write the integers of parts that are alike to the data file, stacked along N."""
        n, k = sum(part.n for part in parts), parts[0].k
        jobs = (lambda job=job: weights.blocks(job()) for part in parts for job in self.integers(part))
        return self.write(name, jobs, (n, k), parts[0])

    def write(
        self, name: str, jobs: Iterator[Callable[[], weights.Blocks]], shape: tuple[int, int], like: Part
    ) -> Stored:
        """Write integers that come some rows at a time."""
        (n, k), bits, block = shape, like.bits, like.block
        assert bits is not None
        scales: list[np.ndarray] = []
        zeros: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for packed, scale, zero_point in weights.in_order(jobs):
                scales.append(scale)
                zeros.append(zero_point)
                yield packed

        shape3 = (n, k // block, block * bits // 8)
        weight = self.graph.stream(f"{name}.qweight", ir.DataType.UINT8, shape3, codes())
        scale = self.graph.weight(f"{name}.scales", np.concatenate(scales))
        zero = np.concatenate(zeros)
        plain = zero.tobytes() == weights.middle_zero_point(k // block, bits) * n
        zero_points = None if plain else self.graph.weight(f"{name}.qzeros", zero)
        return Stored(weight, scale, zero_points, shape, bits, block)

    def multiply(self, x: ir.Value, stored: Stored, name: str, bias: ir.Value | None = None) -> ir.Value:
        """Return ``x`` [..., K] times the stored weight [N, K] transposed."""
        n, k = stored.shape
        inputs = [x, stored.weight, stored.scales, stored.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        level = self.options.accuracy_level if self.options.target.accuracy_level else 0
        attributes = {"K": k, "N": n, "bits": stored.bits, "block_size": stored.block, "accuracy_level": level}
        return self.graph.op("MatMulNBits", inputs, f"{name}.MatMulNBits", attributes)

    def _adapter(self, x: ir.Value, y: ir.Value, name: str, parts: Sequence[Part]) -> ir.Value:
        """Add ``x @ A @ B``, for matrices ``x`` [B * T, K] and ``y`` [B * T, N]; A and B are inputs, of rank 0 unless
        they are given. Two Gemm, of which the second adds: without an adapter, they cost a copy of ``y``."""
        n, k = sum(part.n for part in parts), parts[0].k
        rank = f"R.{name}"  # one symbol per module: ranks may differ between modules of one adapter
        a = self._adapter_input(f"{name}.lora_A", (k, rank))
        b = self._adapter_input(f"{name}.lora_B", (rank, n))
        low = self.graph.op("Gemm", [x, a], f"{name}.lora_A.Gemm")  # [B * T, K] -> [B * T, R]
        return self.graph.op("Gemm", [low, b, y], f"{name}.lora_B.Gemm")  # [B * T, R] -> [B * T, N]

    def _adapter_input(self, name: str, shape: tuple[int | str, int | str]) -> ir.Value:
        half = self.options.float16 or self.options.adapter_precision == "fp16"
        empty = np.zeros([0 if isinstance(size, str) else size for size in shape], np.float16 if half else np.float32)
        value = self.graph.optional_input(f"{name}.weight", shape, empty)
        if self.graph.dtype == ir.DataType.from_numpy(empty.dtype):
            return value
        return self.graph.op("Cast", [value], f"{name}.Cast", {"to": self.graph.dtype})
