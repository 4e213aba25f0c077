"""An ONNX graph under construction, whose weights go to disk one by one while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

ALIGNMENT = 4096
"""Offsets in the data file are whole pages, so that a runtime can map them."""
MODEL, DATA = "model.onnx", "model.onnx.data"
OPSETS = {"": 21, "com.microsoft": 1}
MICROSOFT = {
    "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MoE", "QMoE", "QuickGelu",
    "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip

Chunks = Iterable[np.ndarray]


class Graph:
    """Nodes in the order they are added, and the data file of their weights."""

    def __init__(self, folder: Path, *, float16: bool = False) -> None:
        """``float16``: type of all that is float in the graph; else float32."""
        self.folder = folder
        self.dtype = ir.DataType.FLOAT16 if float16 else ir.DataType.FLOAT
        self._data = (folder / DATA).open("wb")
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, shape: Sequence[int | str], default: np.ndarray) -> ir.Value:
        """Add an input that has a default: an initializer of its name."""
        value = self.input(name, ir.DataType.from_numpy(default.dtype), shape)
        value.const_value = ir.tensor(default, name=name)
        self._initializers[name] = value
        return value

    def output(
        self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str], *, first: bool = False
    ) -> None:
        """Make a node's result a graph output."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.insert(0 if first else len(self._outputs), value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a small initializer kept inside model.onnx, where shape inference can see it; one for each name."""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self._initializers[name]

    def scalar(self, name: str, value: float) -> ir.Value:
        """Return a constant of the graph's float type."""
        return self.constant(name, np.array(value, self.dtype.numpy()))

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """Write an array to the data file, floats in the graph's type, and return its initializer."""
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(self.dtype.numpy())
        return self.stream(name, ir.DataType.from_numpy(array.dtype), array.shape, [array])

    def stream(self, name: str, dtype: ir.DataType, shape: Sequence[int], chunks: Chunks) -> ir.Value:
        """Write an array that comes in consecutive pieces of its type; only one of them need be in memory."""
        start = -(-self._data.tell() // ALIGNMENT) * ALIGNMENT
        self._data.seek(start)
        for chunk in chunks:
            self._data.write(np.ascontiguousarray(chunk).data)
        return self._external(name, dtype, shape, start, self._data.tell() - start)

    def alias(self, name: str, source: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return an initializer of another shape over the same bytes of the data file."""
        tensor = source.const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None and tensor.length is not None
        return self._external(name, tensor.dtype, shape, tensor.offset, tensor.length)

    def _external(self, name: str, dtype: ir.DataType, shape: Sequence[int], offset: int, length: int) -> ir.Value:
        tensor = ir.ExternalTensor(
            DATA, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=str(self.folder)
        )
        assert name not in self._initializers, name
        self._initializers[name] = ir.Value(name=name, const_value=tensor)
        return self._initializers[name]

    def node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Add a node and return its outputs, named after it."""
        domain = "com.microsoft" if kind in MICROSOFT else ""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}" if i else name
        self._nodes.append(node)
        return list(node.outputs)

    def op(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """Add a node with one output and return it."""
        return self.node(kind, inputs, name, attributes)[0]

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write model.onnx and close the data file."""
        from olive import __version__

        self._data.close()
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(OPSETS),
            name="decoder",
        )
        model = ir.Model(graph, ir_version=10, producer_name="olive", producer_version=__version__)
        model.metadata_props.update(metadata)
        ir.save(model, self.folder / MODEL)
