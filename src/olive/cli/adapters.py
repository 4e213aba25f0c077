"""``olive adapters list|check``: what an ONNX model takes of an adapter, and which adapters fit it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.options import Parser
from olive.cli.run import add_log_level
from olive.errors import ConfigError
from olive.model import Model, open_model

if TYPE_CHECKING:
    from olive.runtime.adapters import AdapterInputs


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Tell which adapters an ONNX model takes: list shows its adapter inputs and its adapters, check "
                 "tells whether others fit, with the first tensor that differs (exit code 2).")  # fmt: skip
    own.add_argument("action", choices=["list", "check"], help="What to do.")
    own.add_argument("adapters", nargs="*", metavar="ADAPTER", help="PEFT folders or .onnx_adapter files.")
    own.add_argument("-m", "--model_name_or_path", metavar="FOLDER", help="The ONNX model's folder.")
    own.add_argument("--json", action="store_true", help="Print JSON.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """List, or check."""
    given = [Path(name) for name in getattr(args, "adapters", [])]
    if not hasattr(args, "model_name_or_path"):
        raise ConfigError(f"olive adapters {args.action}: --model_name_or_path (-m) is required")
    if args.action == "check" and not given:
        raise ConfigError("olive adapters check: give one or more adapters: PEFT folders or .onnx_adapter files")
    model = open_model(Path(args.model_name_or_path))
    if model.kind != "onnx":
        raise ConfigError(f"{model.path}: is not an ONNX model; give the folder that auto-opt wrote")
    from olive.runtime.adapters import read_graph

    graph = read_graph(model.path)
    found = [_look(path, graph) for path in given]
    if args.action == "list":
        found = [_look(path, graph, name) for name, path in model.adapters.items()] + found
        told, lines = _taken(graph) | {"adapters": [seen.facts() for seen in found]}, _list(model, graph, found)
    else:
        told, lines = {"adapters": [seen.facts() for seen in found]}, _check(found)
    for line in [json.dumps(told, indent=1)] if hasattr(args, "json") else lines:
        print(line)
    return ConfigError.exit_code if args.action == "check" and not all(seen.fits for seen in found) else 0


@dataclass(frozen=True)
class Seen:
    """An adapter beside a graph."""

    name: str
    path: Path
    size: int
    ranks: tuple[int, ...] = ()
    dtype: str = ""
    modules: tuple[str, ...] = ()
    """Modules of the graph that it fills."""
    reason: str = ""
    """Why it does not fit, "" if it does."""
    tensor: str = ""
    """The first tensor that differs, if that is why."""

    @property
    def fits(self) -> bool:
        """Whether the graph takes it."""
        return not self.reason

    def facts(self) -> dict[str, Any]:
        """Return everything as plain data."""
        own = {"name": self.name, "path": str(self.path), "bytes": self.size, "fits": self.fits}
        if not self.fits:
            return own | {"reason": self.reason, "tensor": self.tensor or None}
        return own | {"ranks": list(self.ranks), "dtype": self.dtype, "modules": list(self.modules)}

    def rank(self) -> str:
        """Return the ranks as text."""
        return str(self.ranks[0]) if len(self.ranks) == 1 else f"{self.ranks[0]}-{self.ranks[-1]}"


def _look(path: Path, graph: AdapterInputs, name: str = "") -> Seen:
    """Read an adapter and hold it beside the graph; whatever is wrong with it is the reason why it does not fit."""
    from olive.runtime.adapters import SUFFIXES, Misfit, check_file

    name = name or (path.name if path.is_dir() else path.stem)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("adapter_model.*")))
    try:
        if path.is_dir():
            from olive.decoder.lora import converted

            adapter = converted(path, graph)
            shapes = {tensor: array.shape for tensor, array in adapter.tensors.items()}
            dtype = adapter.dtype()
        else:
            file = check_file(path, graph)
            shapes, dtype = dict(file.shapes), next(iter(file.dtypes.values()), "")
    except ConfigError as error:
        return Seen(name, path, size, reason=str(error), tensor=error.tensor if isinstance(error, Misfit) else "")
    first = {tensor: shape for tensor, shape in shapes.items() if tensor.endswith(SUFFIXES[0])}
    modules = tuple(sorted((tensor.removesuffix(SUFFIXES[0]) for tensor in first), key=_in_order))
    return Seen(name, path, size, tuple(sorted({shape[1] for shape in first.values()})), dtype, modules)


def _taken(graph: AdapterInputs) -> dict[str, Any]:
    packed = graph.layout.get("packed", {})
    return {
        "model": str(graph.folder),
        "base_digest": graph.base or None,
        "modules": {
            module: {"k": k, "n": n, "dtype": dtype.name, "parts": packed.get(module, {})}
            for module, (k, n, dtype) in graph.modules().items()
        },
    }


def _list(model: Model, graph: AdapterInputs, found: list[Seen]) -> Iterator[str]:
    modules, packed = graph.modules(), graph.layout.get("packed", {})
    yield f"model     {model.path}"
    yield f"base      {graph.base[:12] or 'unknown'}"
    yield f"inputs    {len(modules)} modules take an adapter, of any rank" if modules else "inputs    none"
    rows = [(*_apart(module), modules[module], packed.get(module, {})) for module in sorted(modules, key=_in_order)]
    rows.sort(key=lambda row: row[0])  # those of one name together; layers stay in order
    for (name, (k, n, dtype), parts), group in groupby(
        rows, lambda row: (row[0], row[2], tuple(p.rpartition(".")[2] for p in row[3]))
    ):
        layers = _ranges([row[1] for row in group])
        holds = f"  ({', '.join(parts)})" if parts else ""
        yield f"  {name:<40} K {k:<6} N {n:<6} {dtype.name}  layers {layers}{holds}"
    yield f"adapters  {len(found)}" if found else "adapters  none"
    for seen in found:
        if seen.fits:
            yield (f"  {seen.name:<16} rank {seen.rank():<6} {seen.dtype}  {seen.size / 1e6:.2f} MB  "
                   f"{len(seen.modules)} modules  {seen.path}")  # fmt: skip
        else:
            yield f"  {seen.name:<16} does not fit: {seen.reason}"


def _check(found: list[Seen]) -> Iterator[str]:
    for seen in found:
        if seen.fits:
            yield f"fits      {seen.path}: rank {seen.rank()}, {len(seen.modules)} modules"
        else:
            yield f"misfit    {seen.reason}"


def _apart(module: str) -> tuple[str, int]:
    """Split a module's path into what is the same in every layer, and the layer."""
    number = re.search(r"\.(\d+)\.", module)
    return (module, 0) if number is None else (f"{module[: number.start()]}.*.{module[number.end() :]}", int(number[1]))


def _in_order(module: str) -> tuple[int, str]:
    name, layer = _apart(module)
    return layer, name


def _ranges(numbers: Iterable[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
