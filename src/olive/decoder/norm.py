"""RMS normalization in the graph.

Shape letters: B batch, T tokens, H heads, D head size, K channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from olive.decoder.graph import Graph
from olive.quant.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Norms:
    """Adds norms to a graph, with weights from a checkpoint."""

    graph: Graph
    checkpoint: Checkpoint
    epsilon: float

    def _weight(self, module: str) -> ir.Value:
        name = f"{module}.weight"
        return self.graph.weight(name, self.checkpoint.weight(name).float().numpy())

    def plain(self, x: ir.Value, module: str) -> ir.Value:
        """Normalize the last axis.

        Written in standard operators, which ONNX Runtime fuses into one kernel on loading: the fused operator itself
        is in no published operator set, and the checker refuses it.
        """
        graph = self.graph
        # Pow, not x * x: the fusion looks for it.
        two = graph.constant("two", np.array(2, np.float32))
        square = graph.op("Pow", [x, two], f"{module}.Square")
        axis = graph.constant("last_axis", np.array([-1], np.int64))
        mean = graph.op("ReduceMean", [square, axis], f"{module}.Mean", {"keepdims": 1})
        epsilon = graph.constant("epsilon", np.array(self.epsilon, np.float32))
        root = graph.op("Sqrt", [graph.op("Add", [mean, epsilon], f"{module}.Add")], f"{module}.Sqrt")
        unit = graph.op("Div", [x, root], f"{module}.Div")
        return graph.op("Mul", [unit, self._weight(module)], f"{module}.Mul")

    def heads(self, x: ir.Value, module: str, head_dim: int) -> ir.Value:
        """Normalize each head of ``x`` [B, T, H * D] by itself."""
        graph = self.graph
        apart = graph.constant(f"heads_of_{head_dim}", np.array([0, 0, -1, head_dim], np.int64))
        together = graph.constant("channels", np.array([0, 0, -1], np.int64))
        split = graph.op("Reshape", [x, apart], f"{module}.Heads")  # [B, T, H * D] -> [B, T, H, D]
        normed = self.plain(split, module)
        return graph.op("Reshape", [normed, together], f"{module}.Channels")  # [B, T, H, D] -> [B, T, H * D]

    def add(self, x: ir.Value, residual: ir.Value, module: str, *, last: bool = False) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum of ``x`` and ``residual``, and the sum; ``last``: nobody needs the sum."""
        found = self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._weight(module)],
            f"{module}.SkipNorm",
            {"epsilon": self.epsilon},
            outputs=1 if last else 4,
        )
        for unused in found[1:3]:
            unused.name = ""  # mean and inverse deviation are for training
        return found[0], found[-1]
