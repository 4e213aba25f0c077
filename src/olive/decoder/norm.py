"""RMS and layer normalization in the graph.

Shape letters: B batch, T tokens, H heads, D head size, K channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from olive.decoder.architecture import Architecture
from olive.decoder.graph import Graph
from olive.decoder.source import Source


@dataclass(frozen=True)
class Norms:
    """Adds norms to a graph, with weights from a checkpoint."""

    graph: Graph
    source: Source
    arch: Architecture

    def _weight(self, module: str) -> ir.Value:
        weight = self.source.tensor(f"{module}.weight") + self.arch.norm_offset
        return self.graph.weight(f"{module}.weight", weight.numpy())

    def _bias(self, module: str) -> ir.Value:
        return self.graph.weight(f"{module}.bias", self.source.tensor(f"{module}.bias").numpy())

    def plain(self, x: ir.Value, module: str) -> ir.Value:
        """Normalize the last axis."""
        if self.arch.norm == "rms":
            return self._rms(x, module)
        attributes = {"axis": -1, "epsilon": self.arch.epsilon}
        inputs = [x, self._weight(module), self._bias(module)]
        return self.graph.op("LayerNormalization", inputs, f"{module}.LayerNorm", attributes)

    def _rms(self, x: ir.Value, module: str) -> ir.Value:
        """Written in standard operators, which ONNX Runtime fuses into one kernel on loading: the fused operator itself
        is in no published operator set, and the checker refuses it. Squares are taken in float32, as in the kernel."""
        graph, half = self.graph, self.graph.dtype == ir.DataType.FLOAT16
        if half:
            x = graph.op("Cast", [x], f"{module}.Float32", {"to": ir.DataType.FLOAT})
        # Pow, not x * x: the fusion looks for it.
        two = graph.constant("two", np.array(2, np.float32))
        square = graph.op("Pow", [x, two], f"{module}.Square")
        axis = graph.constant("last_axis", np.array([-1], np.int64))
        mean = graph.op("ReduceMean", [square, axis], f"{module}.Mean", {"keepdims": 1})
        epsilon = graph.constant("epsilon", np.array(self.arch.epsilon, np.float32))
        root = graph.op("Sqrt", [graph.op("Add", [mean, epsilon], f"{module}.Add")], f"{module}.Sqrt")
        unit = graph.op("Div", [x, root], f"{module}.Div")
        if half:
            unit = graph.op("Cast", [unit], f"{module}.Float16", {"to": ir.DataType.FLOAT16})
        return graph.op("Mul", [unit, self._weight(module)], f"{module}.Mul")

    def heads(self, x: ir.Value, module: str) -> ir.Value:
        """Normalize queries or keys ``x`` [B, T, H * D]: each head by itself, or all channels as one."""
        if self.arch.qk_norm == "channels":
            return self.plain(x, module)
        graph, size = self.graph, self.arch.head_dim
        apart = graph.constant(f"heads_of_{size}", np.array([0, 0, -1, size], np.int64))
        together = graph.constant("channels", np.array([0, 0, -1], np.int64))
        split = graph.op("Reshape", [x, apart], f"{module}.Heads")  # [B, T, H * D] -> [B, T, H, D]
        normed = self.plain(split, module)
        return graph.op("Reshape", [normed, together], f"{module}.Channels")  # [B, T, H, D] -> [B, T, H * D]

    def add(self, x: ir.Value, residual: ir.Value, module: str, *, last: bool = False) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum of ``x`` and ``residual``, and the sum; ``last``: nobody needs the sum. Without a
        ``module`` the sum itself takes the place of the normalized one."""
        if not module:
            total = self.graph.op("Add", [x, residual], f"{x.name}.Residual")
            return total, total
        rms = self.arch.norm == "rms"
        kind = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        inputs = [x, residual, self._weight(module), *([] if rms else [self._bias(module)])]
        attributes = {"epsilon": self.arch.epsilon}
        found = self.graph.node(kind, inputs, f"{module}.SkipNorm", attributes, outputs=1 if last else 4)
        for unused in found[1:3]:
            unused.name = ""  # mean and inverse deviation are for training
        return found[0], found[-1]
