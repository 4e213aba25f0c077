"""Token embeddings and lm_head in the graph; a tied model has one table for both.

Shape letters: B batch, T tokens, V vocabulary, K channels, S group size, G = K / S groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from olive.decoder.architecture import Architecture
from olive.decoder.graph import Graph
from olive.decoder.linear import Linears, Part, Stored


class Tables:
    """The two ends of the graph."""

    def __init__(self, linears: Linears, arch: Architecture) -> None:
        self.linears, self.arch, self.graph = linears, arch, linears.graph
        self.embeddings, self.head_module = arch.names.embeddings, arch.names.head
        options, quantized = linears.options, bool(linears.source.quantized)
        self.embedding_bits = options.embedding_bits(quantized=quantized, tied=arch.tied)
        self.head_bits = options.head_bits(quantized=quantized)
        self._float: ir.Value | None = None
        self._stored: Stored | None = None

    def embed(self, ids: ir.Value) -> ir.Value:
        """Return the embeddings [B, T, K] of token ids int64 [B, T]."""
        name = self.embeddings
        part = self.linears.part(name, self.embedding_bits)
        if part.bits is None:
            self._float = self._table(part)
            x = self.graph.op("Gather", [self._float, ids], f"{name}.Gather")
        else:
            self._stored = self.linears.store(name, [part])
            x = self._gather(self._stored, ids)
        self.linears.done(name)
        return scaled(self.graph, x, self.arch.embedding_scale, f"{name}.Scale")

    def _gather(self, stored: Stored, ids: ir.Value) -> ir.Value:
        v, k = stored.shape
        # the same bytes as in MatMulNBits, without the axis of groups: [V, G, S * bits / 8] -> [V, K * bits / 8]
        rows = self.graph.alias(f"{self.embeddings}.rows", stored.weight, (v, k * stored.bits // 8))
        inputs = [rows, ids, stored.scales, *([stored.zero_points] if stored.zero_points else [])]
        attributes = {"bits": stored.bits, "block_size": stored.block, "gather_axis": 0, "quantize_axis": 1}
        return self.graph.op("GatherBlockQuantized", inputs, f"{self.embeddings}.GatherBlockQuantized", attributes)

    def positions(self, x: ir.Value, ids: ir.Value) -> ir.Value:
        """Add learned position embeddings to ``x`` [B, T, K]; ``ids`` int64 [B, T] count from 0."""
        name = self.arch.names.positions
        if self.arch.first_position:
            first = self.graph.constant("first_position", np.array(self.arch.first_position, np.int64))
            ids = self.graph.op("Add", [ids, first], f"{name}.first")
        table = self.graph.weight(f"{name}.weight", self.linears.source.tensor(f"{name}.weight").numpy())
        rows = self.graph.op("Gather", [table, ids], f"{name}.Gather")
        return self.graph.op("Add", [x, rows], f"{name}.Add")

    def head(self, x: ir.Value) -> ir.Value:
        """Return the logits [B, T, V] of ``x`` [B, T, K]."""
        name, arch = self.head_module, self.arch
        logits = self._tied_head(x) if arch.tied else self.linears.linear(x, [name], name, self.head_bits)
        logits = scaled(self.graph, logits, arch.logit_scale, f"{name}.Scale")
        if not arch.logit_softcap:
            return logits
        cap = self.graph.scalar("logit_softcap", arch.logit_softcap)
        small = self.graph.op("Div", [logits, cap], f"{name}.Div")
        return self.graph.op("Mul", [self.graph.op("Tanh", [small], f"{name}.Tanh"), cap], f"{name}.Softcap")

    def _tied_head(self, x: ir.Value) -> ir.Value:
        linears, name = self.linears, self.head_module
        held = self.embeddings in linears.source.quantized  # its integers are those of the head, whatever is asked
        if self._stored and (held or self._stored.bits == self.head_bits):
            linears.bits[name] = self._stored.bits
            return linears.multiply(x, self._stored, name)
        if self._float is None or self.head_bits is not None:  # asked for in two precisions: a table of its own
            part = linears.part(self.embeddings, self.head_bits, recorded_as=name)
            if part.bits is not None:
                return linears.multiply(x, linears.store(name, [part]), name)
            self._float = self._float or self._table(part)
        linears.bits[name] = "float"
        # reads the table by rows as it is; a Transpose would be folded into a copy on every load
        return self.graph.op("FusedMatMul", [x, self._float], f"{name}.FusedMatMul", {"transB": 1})

    def _table(self, part: Part) -> ir.Value:
        source, dtype = self.linears.source, self.graph.dtype.numpy()

        def rows() -> Iterator[np.ndarray]:
            if part.held is not None:
                yield part.held.dequantize().numpy().astype(dtype, copy=False)
                return
            for read in source.slices(part.module):
                yield read().float().numpy().astype(dtype, copy=False)

        return self.graph.stream(f"{self.embeddings}.weight", self.graph.dtype, (part.n, part.k), rows())


def scaled(graph: Graph, x: ir.Value, factor: float, name: str) -> ir.Value:
    """Return ``x`` times a constant, or ``x`` itself where that is 1."""
    return x if factor == 1 else graph.op("Mul", [x, graph.scalar(f"{name}.factor", factor)], name)
