"""How long one run of any ONNX graph takes, on inputs made up from the shapes that it declares."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.intervals import interval, percentile
from olive.model import Model

if TYPE_CHECKING:
    import numpy as np

SHARES = {"latency_p50": 0.5, "latency_p90": 0.9, "latency_p99": 0.99}
DIMS = {
    "batch_size": 1, "batch": 1, "sequence_length": 128, "sequence": 128, "past_sequence_length": 0,
    "total_sequence_length": 128,
}  # fmt: skip
"""Sizes of symbolic dimensions where nothing is said: one row of 128 tokens, read from the start."""
TYPES = {"float": "float32", "float16": "float16", "double": "float64", "int64": "int64", "int32": "int32",
         "int8": "int8", "uint8": "uint8", "bool": "bool"}  # fmt: skip
"""Element types of ONNX Runtime's ``tensor(TYPE)`` that inputs are made up of, with numpy's names."""


class Latency(Evaluator):
    """Percentiles of the time that one run of the graph takes, in milliseconds, as ONNX Runtime runs it.

    Inputs are made up: standard normal for floats, 1 for masks and switches, 0 for other integers. After the warm-up
    each round is one run, timed by itself; the report has the range of each percentile with 95 % confidence.
    """

    names = tuple(SHARES)
    kinds = ("onnx",)
    exclusive = True

    dims: dict[str, int] = Field(default_factory=dict)
    """Sizes of symbolic dimensions of the inputs, by name. Without it: batch_size 1, sequence_length 128."""
    warmup: int = Field(10, ge=0)
    """Rounds before the measured ones."""
    rounds: int = Field(100, ge=1)
    """Rounds that are measured."""

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        session = open_graph(graph_file(model.path))
        inputs = dummy_inputs(session, self.dims, ctx.seed, str(model.path))
        times = []
        for number in range(self.warmup + self.rounds):
            started = time.perf_counter()
            session.run(None, inputs)
            if number >= self.warmup:
                times.append(1e3 * (time.perf_counter() - started))
        ranges = {name: interval(times, partial(percentile, share=share), ctx.seed) for name, share in SHARES.items()}
        ctx.note(inputs={name: list(value.shape) for name, value in inputs.items()}, intervals=ranges)
        return {name: percentile(times, share) for name, share in SHARES.items()}


def graph_file(folder: Path) -> Path:
    """Return the folder's graph: model.onnx, or the only .onnx file."""
    found = sorted(folder.glob("*.onnx"))
    if folder / "model.onnx" in found:
        return folder / "model.onnx"
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{folder}: expected model.onnx or one other .onnx file, found {names}")
    return found[0]


def open_graph(file: Path) -> Any:
    """Open a graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of ONNX Runtime's error classes derives from Exception alone
        raise OliveError(f"{file}: ONNX Runtime cannot load it: {error}") from None


def dummy_inputs(session: Any, dims: dict[str, int], seed: int, where: str) -> dict[str, np.ndarray]:
    """Make up a value for every input that the graph needs."""
    import numpy as np

    source = np.random.default_rng(seed)
    declared = {dim for value in session.get_inputs() for dim in value.shape if not isinstance(dim, int)}
    for name, size in dims.items():
        if name not in declared:
            has = ", ".join(sorted(map(str, declared))) or "none"
            raise ConfigError(f"{where}: dims: the graph has no symbolic dimension {name}; it has: {has}")
        if size < 0:
            raise ConfigError(f"{where}: dims: {name}={size}: a size is 0 or more")
    sizes = DIMS | dims
    if "total_sequence_length" not in dims:
        sizes["total_sequence_length"] = sizes["sequence_length"] + sizes["past_sequence_length"]
    made = {}
    for value in session.get_inputs():
        kind = TYPES.get(value.type.removeprefix("tensor(").removesuffix(")"))
        if kind is None:
            raise ConfigError(f"{where}: input {value.name} has type {value.type}, which cannot be made up")
        for dim in value.shape:
            if not isinstance(dim, int) and dim not in sizes:
                raise ConfigError(f"{where}: input {value.name} {value.shape}: how large is {dim}? Give dims: {dim}=N")
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in value.shape]
        if kind.startswith("float"):
            made[value.name] = source.standard_normal(shape).astype(kind)
        elif kind == "bool" or "mask" in value.name:
            made[value.name] = np.ones(shape, kind)
        else:
            made[value.name] = np.zeros(shape, kind)
    return made
