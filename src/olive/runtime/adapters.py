"""Adapters of an ONNX folder: which inputs they fill, files of them, and whether a file fits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olive.errors import ConfigError

SUFFIXES = (".lora_A.weight", ".lora_B.weight")
METADATA = "olive.adapters"
BASE = "olive.base"
UNKNOWN_BASE = 1

Shape = tuple[int | None, ...]
"""None where a size is free: the rank."""
DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}
"""By ONNX's number of the type."""
NAMES = {"float": "float32"}
"""numpy's names of types that ONNX Runtime calls otherwise."""


class Misfit(ConfigError):
    """An adapter that a graph has no place for; ``tensor`` is the first that differs, "" if it is none."""

    def __init__(self, message: str, tensor: str = "") -> None:
        super().__init__(message)
        self.tensor = tensor


@dataclass(frozen=True)
class Input:
    """An adapter input of a graph."""

    shape: Shape
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class AdapterInputs:
    """What a folder's graph takes of an adapter."""

    folder: Path
    inputs: Mapping[str, Input]
    layout: Mapping[str, Any]
    """How its modules pack those of the checkpoint: fields of the decoder's ``Layout``."""
    base: str
    """Digest of the checkpoint that the graph was built from, "" if unknown."""

    def modules(self) -> dict[str, tuple[int, int, np.dtype[Any]]]:
        """Return K, N and type of each module that takes an adapter."""
        found = {}
        for name, own in self.inputs.items():
            module = name.removesuffix(SUFFIXES[0])
            if name.endswith(SUFFIXES[0]) and module + SUFFIXES[1] in self.inputs:
                k, n = own.shape[0], self.inputs[module + SUFFIXES[1]].shape[1]
                assert k is not None and n is not None
                found[module] = (k, n, own.dtype)
        return found


@dataclass(frozen=True)
class AdapterFile:
    """What an ``.onnx_adapter`` file holds."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    base: int
    """Start of the digest of the base that it was made for, as :func:`base_mark` gives it."""

    def ranks(self) -> set[int]:
        """Return the ranks of its modules."""
        return {shape[1] for name, shape in self.shapes.items() if name.endswith(SUFFIXES[0])}


def read_graph(folder: Path) -> AdapterInputs:
    """Read what a folder's graph takes; the weights are not read."""
    import onnx

    path = folder / "model.onnx"
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not an ONNX model folder (no model.onnx)") from None
    except Exception as error:  # protobuf's DecodeError, whose package has no types
        raise ConfigError(f"{path}: not an ONNX model: {error}") from None
    found: dict[str, Input] = {}
    for value in model.graph.input:
        if value.name.endswith(SUFFIXES):
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            found[value.name] = Input(shape, DTYPES[kind.elem_type])
    props = {p.key: p.value for p in model.metadata_props}
    return AdapterInputs(folder, found, json.loads(props.get(METADATA, "{}")), props.get(BASE, ""))


def read(file: Path) -> AdapterFile:
    """Read names, shapes and types of the tensors of an ``.onnx_adapter`` file."""
    import onnxruntime

    if not file.is_file():
        raise ConfigError(f"{file}: no such adapter file")
    try:
        form = onnxruntime.AdapterFormat.read_adapter(str(file))
        values = form.get_parameters()
    except Exception as error:  # ONNX Runtime raises bare RuntimeError and its own kinds here
        raise ConfigError(f"{file}: not an .onnx_adapter file: {error}") from None
    kinds = {name: value.data_type().removeprefix("tensor(").rstrip(")") for name, value in values.items()}
    return AdapterFile(
        {name: tuple(value.shape()) for name, value in sorted(values.items())},
        {name: NAMES.get(kind, kind) for name, kind in sorted(kinds.items())},
        form.get_model_version(),
    )


def base_mark(base: str) -> int:
    """Return the start of a base's digest as the number that a file can hold: what its format calls the version of the
    model that the adapter belongs to."""
    return int(base[:7], 16) if base else UNKNOWN_BASE


def write(file: Path, tensors: Mapping[str, np.ndarray], base: str = "") -> None:
    """Write an ``.onnx_adapter`` file for graphs of the base with this digest."""
    import onnxruntime

    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(base_mark(base))
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for n, t in sorted(tensors.items())}
    form.set_parameters(values)
    building = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        form.export_adapter(str(building))
        building.replace(file)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{file}: cannot be written: {error}") from None
    finally:
        building.unlink(missing_ok=True)


def check(shapes: Mapping[str, Sequence[int]], graph: AdapterInputs, where: str) -> None:
    """Refuse an adapter that a graph has no place for, by its first tensor that differs."""
    folder, expected = graph.folder, graph.inputs
    advice = f"build {folder.name} again with this adapter, or train the adapter on the model that it was built from"
    for name, given in sorted(shapes.items()):
        if name not in expected:
            listed = f"it has {len(expected)} adapter inputs" if expected else "it has no adapter inputs"
            raise Misfit(f"{where}: does not fit {folder}: the graph has no input {name} {list(given)} "
                         f"({listed}); {advice}", name)  # fmt: skip
        want = expected[name].shape
        if len(given) != len(want) or any(w is not None and g != w for g, w in zip(given, want, strict=True)):
            shape = ["R" if size is None else size for size in want]
            raise Misfit(f"{where}: does not fit {folder}: {name} has shape {list(given)}, expected "
                         f"[{', '.join(map(str, shape))}]; {advice}", name)  # fmt: skip
    for name, given in sorted(shapes.items()):
        if name.endswith(SUFFIXES[0]):
            other = name.removesuffix(SUFFIXES[0]) + SUFFIXES[1]
            if other not in shapes or shapes[other][0] != given[1]:
                raise Misfit(f"{where}: {name} has rank {given[1]}, but {other} "
                             f"{'is missing' if other not in shapes else f'has rank {shapes[other][0]}'}; "
                             "convert the adapter again", name)  # fmt: skip


def check_file(file: Path, graph: AdapterInputs) -> AdapterFile:
    """Refuse an ``.onnx_adapter`` file that does not fit a graph; return what it holds."""
    found, again = read(file), "convert the adapter again for this folder"
    check(found.shapes, graph, str(file))
    for name, given in found.dtypes.items():
        wanted = graph.inputs[name].dtype.name
        if given != wanted:
            raise Misfit(f"{file}: does not fit {graph.folder}: {name} is {given}, expected {wanted}; {again}", name)
    if graph.base and found.base not in (0, UNKNOWN_BASE, base_mark(graph.base)):
        raise Misfit(f"{file}: made for another base than {graph.folder} (base_digest {found.base:07x}, expected "
                     f"{graph.base[:7]}); {again}")  # fmt: skip
    return found
