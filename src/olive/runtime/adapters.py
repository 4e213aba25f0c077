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

Shape = tuple[int | None, ...]
"""None where a size is free: the rank."""
DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}
"""By ONNX's number of the type."""


@dataclass(frozen=True)
class Input:
    """An adapter input of a graph."""

    shape: Shape
    dtype: np.dtype[Any]


def _load(folder: Path) -> Any:
    import onnx

    path = folder / "model.onnx"
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not an ONNX model folder (no model.onnx)") from None
    except Exception as error:  # protobuf's DecodeError, whose package has no types
        raise ConfigError(f"{path}: not an ONNX model: {error}") from None


def expected_inputs(folder: Path) -> dict[str, Input]:
    """Return the adapter inputs of a folder's graph, by name; the weights are not read."""
    found: dict[str, Input] = {}
    for value in _load(folder).graph.input:
        if value.name.endswith(SUFFIXES):
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            found[value.name] = Input(shape, DTYPES[kind.elem_type])
    return found


def metadata(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what an adapter must know of a graph: how its modules pack those of the checkpoint (``packed``, ``split``,
    ``by_head``), and the digest of its base ("" if unknown)."""
    props = {p.key: p.value for p in _load(folder).metadata_props}
    return json.loads(props.get(METADATA, "{}")), props.get(BASE, "")


def read(file: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of an ``.onnx_adapter`` file."""
    return {name: tuple(value.shape()) for name, value in _parameters(file).items()}


def _parameters(file: Path) -> Any:
    import onnxruntime

    if not file.is_file():
        raise ConfigError(f"{file}: no such adapter file")
    try:
        return onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    except Exception as error:  # ONNX Runtime raises bare RuntimeError and its own kinds here
        raise ConfigError(f"{file}: not an .onnx_adapter file: {error}") from None


def write(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write an ``.onnx_adapter`` file."""
    import onnxruntime

    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
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


def check(shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Input], folder: Path, where: str) -> None:
    """Refuse an adapter that a folder's graph has no place for, by its first tensor that differs."""
    advice = f"build {folder.name} again with this adapter, or train the adapter on the model that it was built from"
    for name, given in sorted(shapes.items()):
        if name not in expected:
            listed = f"it has {len(expected)} adapter inputs" if expected else "it has no adapter inputs"
            raise ConfigError(f"{where}: does not fit {folder}: the graph has no input {name} {list(given)} "
                              f"({listed}); {advice}")  # fmt: skip
        want = expected[name].shape
        if len(given) != len(want) or any(w is not None and g != w for g, w in zip(given, want, strict=True)):
            shape = ["R" if size is None else size for size in want]
            raise ConfigError(f"{where}: does not fit {folder}: {name} has shape {list(given)}, expected "
                              f"[{', '.join(map(str, shape))}]; {advice}")  # fmt: skip
    for name, given in sorted(shapes.items()):
        if name.endswith(SUFFIXES[0]):
            other = name.removesuffix(SUFFIXES[0]) + SUFFIXES[1]
            if other not in shapes or shapes[other][0] != given[1]:
                raise ConfigError(f"{where}: {name} has rank {given[1]}, but {other} "
                                  f"{'is missing' if other not in shapes else f'has rank {shapes[other][0]}'}; "
                                  "convert the adapter again")  # fmt: skip


def check_file(file: Path, folder: Path) -> None:
    """Refuse an ``.onnx_adapter`` file that does not fit a folder."""
    expected, parameters = expected_inputs(folder), _parameters(file)
    check({name: tuple(value.shape()) for name, value in parameters.items()}, expected, folder, str(file))
    for name, value in parameters.items():
        given = value.data_type().removeprefix("tensor(").rstrip(")")
        wanted = {"float32": "float"}.get(expected[name].dtype.name, expected[name].dtype.name)
        if given != wanted:
            raise ConfigError(f"{file}: does not fit {folder}: {name} is {given}, expected {wanted}; convert the "
                              "adapter again for this folder")  # fmt: skip
