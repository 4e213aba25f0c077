"""LoRA adapters for a built graph: names and layout of their tensors, and conversion from PEFT.

Shape letters: N out channels, K in channels, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olive.decoder.architecture import QKV, Architecture
from olive.decoder.peft import Lora, read_peft
from olive.decoder.source import Source
from olive.errors import ConfigError
from olive.model import read_manifest
from olive.runtime import adapters


@dataclass(frozen=True)
class Layout:
    """Where the graph takes the modules of an adapter, which may pack linears otherwise than the graph does."""

    plain: frozenset[str] = frozenset()
    """Modules of the graph that hold one linear."""
    packed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Modules of the graph that hold several linears side by side: {module: {linear: N}}, in order."""
    split: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The other way round: {name of a packed linear: {module of the graph: N}}, in order."""
    by_head: Mapping[str, int] = field(default_factory=dict)
    """Heads of the packed modules whose checkpoint has queries, keys and values head by head."""
    layers: str = "model.layers."
    """What is in front of a layer's number."""

    def places(self, module: str) -> list[str]:
        """Return the modules of the graph that take an adapted module; none if it does not fit."""
        if module in self.plain or module in self.packed:
            return [module]
        owners = [own for own, parts in self.packed.items() if module in parts]
        return owners or list(self.split.get(module, {}))

    def adaptable(self, arch: Architecture) -> list[str]:
        """Return what an adapter may name in a layer, for an error."""
        prefix = arch.prefix(0)
        names = [*self.plain, *self.packed, *self.split, *(part for parts in self.packed.values() for part in parts)]
        return sorted({name.removeprefix(prefix) for name in names if name.startswith(prefix)})

    def of(self, modules: Collection[str]) -> dict[str, Any]:
        """Return the part that concerns some modules of the graph, as plain data for its metadata."""
        return {
            "packed": {m: parts for m, parts in self.packed.items() if m in modules},
            "split": {m: parts for m, parts in self.split.items() if set(parts) & set(modules)},
            "by_head": {m: heads for m, heads in self.by_head.items() if m in modules},
            "layers": self.layers,
        }


def layout(arch: Architecture, source: Source, *, stored: bool = False) -> Layout:
    """Return where the graph of a checkpoint takes adapters: on all linears but those of experts. ``stored``: where
    the checkpoint itself has these linears."""
    names, head_dim = arch.names, arch.head_dim
    plain: set[str] = set()
    packed: dict[str, dict[str, int]] = {}
    split: dict[str, dict[str, int]] = {}
    by_head: dict[str, int] = {}
    for layer in range(arch.layers):
        prefix = arch.prefix(layer)
        own = [prefix + names.attention_out]
        qkv = prefix + arch.qkv_module()
        widths = [head_dim * heads for heads in (arch.heads, arch.kv_heads, arch.kv_heads)]
        apart = len(names.qkv) > 1
        if apart or qkv.endswith(".qkv_proj"):
            parts = dict(zip((prefix + part for part in (names.qkv if apart else QKV)), widths, strict=True))
            (split if stored and apart else packed)[qkv] = parts
            own += parts if stored and apart else []
        else:
            own.append(qkv)
        if arch.qkv_by_head and not stored:
            by_head[qkv] = arch.heads
        if not arch.has_experts(layer):
            gate_up = [prefix + name for name in names.gate_up]
            sizes = [source.shape(name)[0] for name in gate_up]
            own.append(prefix + names.down)
            if len(gate_up) == 2:
                own += gate_up
                split[f"{prefix}mlp.gate_up_proj"] = dict(zip(gate_up, sizes, strict=True))
            elif gate_up[0].endswith(".gate_up_proj"):
                both = (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
                packed[gate_up[0]] = dict.fromkeys(both, sizes[0] // 2)
            else:
                own += gate_up
        plain |= set(own)
    return Layout(frozenset(plain), packed, split, by_head, names.layer.partition("{}")[0])


def placed(peft: Mapping[str, Lora], places: Layout, where: str) -> dict[str, Lora]:
    """Bring an adapter, read from ``where``, to the modules of a layout: each gets one pair, whatever it packs.

    In a packed module the A of the parts lie side by side and their B on the diagonal; a part that is not adapted
    adds no rank. A packed module of the adapter that the graph has apart gives its A to each.
    """
    found: dict[str, list[Lora]] = {}
    for module, lora in sorted(peft.items()):
        if module in places.split:
            for own, b in _cut(module, lora.b, places.split[module], where):
                found.setdefault(own, []).append(Lora(lora.a, b))
            continue
        owner = next((own for own, parts in places.packed.items() if module in parts), None)
        if owner is not None:
            lora = Lora(lora.a, _widened(module, lora.b, places.packed[owner], where))
        elif module in places.by_head:
            lora = Lora(lora.a, _by_kind(lora.b, places.by_head[module]))
        found.setdefault(owner or module, []).append(lora)
    return {
        module: Lora(
            np.concatenate([lora.a for lora in loras], axis=1),  # [K, sum of R]
            np.concatenate([lora.b for lora in loras]),  # [sum of R, N]
        )
        for module, loras in found.items()
    }


def _cut(module: str, b: np.ndarray, parts: Mapping[str, int], where: str) -> Iterator[tuple[str, np.ndarray]]:
    """Cut B [R, sum of N] of a packed module into those of its parts."""
    _check_width(module, b, sum(parts.values()), where)
    start = 0
    for name, n in parts.items():
        yield name, b[:, start : start + n]
        start += n


def _widened(module: str, b: np.ndarray, parts: Mapping[str, int], where: str) -> np.ndarray:
    """Put B [R, N] of a part in its place among zeros: [R, sum of N]."""
    _check_width(module, b, parts[module], where)
    start = sum(n for name, n in list(parts.items())[: list(parts).index(module)])
    wide = np.zeros((len(b), sum(parts.values())), np.float32)
    wide[:, start : start + b.shape[1]] = b
    return wide


def _check_width(module: str, b: np.ndarray, n: int, where: str) -> None:
    if b.shape[1] != n:
        name = f"{module}.lora_B.weight"
        raise adapters.Misfit(f"{where}: {name} has {b.shape[1]} out channels, expected {n}; give the base that the "
                              "adapter was trained on", name)  # fmt: skip


def _by_kind(b: np.ndarray, heads: int) -> np.ndarray:
    """Bring the columns of B from head by head to queries, keys, values: [R, H * 3 * D] -> [R, 3 * H * D]."""
    return b.reshape(len(b), heads, 3, -1).swapaxes(1, 2).reshape(len(b), -1)


@dataclass(frozen=True)
class Converted:
    """An adapter as the inputs of a graph that it fits."""

    tensors: Mapping[str, np.ndarray]
    """A [K, R] and B [R, N] of each module of the graph, in the type of its inputs."""
    rank: int
    """Largest rank that the adapter was trained with; packed modules have the sum of their parts' ranks."""
    base: str
    """Digest of the graph's base, "" if unknown."""

    def dtype(self) -> str:
        """Return the type of its tensors."""
        return next(str(tensor.dtype) for tensor in self.tensors.values())

    def facts(self) -> dict[str, Any]:
        """Describe the adapter for a manifest."""
        return {
            "rank": self.rank,
            "dtype": self.dtype(),
            "base_digest": self.base,
            "shapes": {name: list(tensor.shape) for name, tensor in sorted(self.tensors.items())},
        }


def converted(adapter: Path, graph: adapters.AdapterInputs) -> Converted:
    """Lay out a PEFT adapter for a graph; a misfit is refused.

    Inputs that the adapter has nothing for are left out: their default has rank 0.
    """
    check_base(adapter, graph.base, str(graph.folder))
    places = Layout(**graph.layout)
    own = read_peft(adapter, places.layers)
    tensors: dict[str, np.ndarray] = {}
    for module, lora in placed(own, places, str(adapter)).items():
        tensors |= zip((module + suffix for suffix in adapters.SUFFIXES), (lora.a, lora.b), strict=True)
    adapters.check({name: tensor.shape for name, tensor in tensors.items()}, graph, str(adapter))
    with np.errstate(over="ignore"):
        exact = {name: tensor.astype(graph.inputs[name].dtype) for name, tensor in tensors.items()}
    for name, tensor in exact.items():
        if not np.isfinite(tensor).all():
            raise ConfigError(f"{adapter}: {name} is too large for {tensor.dtype} (up to "
                              f"{np.abs(tensors[name]).max():.3g}); build the model with adapters in fp32")  # fmt: skip
    return Converted(exact, max(len(lora.b) for lora in own.values()), graph.base)


def convert(adapter: Path, onnx_folder: Path, out_file: Path) -> Converted:
    """Write a PEFT adapter as an ``.onnx_adapter`` file for a built folder; return what was written."""
    found = converted(adapter, adapters.read_graph(onnx_folder))
    adapters.write(out_file, found.tensors, found.base)
    return found


def check_base(adapter: Path, base: str, where: str) -> None:
    """Refuse an adapter whose manifest names another base; without a manifest or a digest there is nothing to check."""
    trained_on = (read_manifest(adapter) or {}).get("base_digest")
    if trained_on and base and trained_on != base:
        raise ConfigError(f"{adapter}: trained on another base than {where} (base_digest {trained_on[:12]}, expected "
                          f"{base[:12]}); give the base that it was trained on")  # fmt: skip
