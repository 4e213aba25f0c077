"""LoRA adapters for a built graph: names and layout of their tensors, and conversion from PEFT.

Shape letters: N out channels, K in channels, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from olive.decoder.families import Architecture
from olive.decoder.peft import Lora, read_peft
from olive.errors import ConfigError
from olive.model import read_manifest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime import adapters

Packed = Mapping[str, Mapping[str, int]]
"""Modules of the graph that hold several of the checkpoint: {graph module: {checkpoint module: N}}, in order."""


def packing(arch: Architecture, checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return the packed modules of every layer."""
    found = {}
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        for module, parts in arch.packing().items():
            found[prefix + module] = {prefix + p: checkpoint.linear_shape(prefix + p)[0] for p in parts}
    return found


def graph_modules(targets: Iterable[str], packed: Packed) -> set[str]:
    """Map adapted modules of the checkpoint to the graph's modules."""
    owner = {part: module for module, parts in packed.items() for part in parts}
    return {owner.get(target, target) for target in targets}


def graph_tensors(peft: Mapping[str, Lora], packed: Packed) -> dict[str, np.ndarray]:
    """Lay out an adapter as the graph's inputs: A float32 [K, R] and B float32 [R, N] of each module.

    In a packed module the A of the parts lie side by side and their B on the diagonal; a part that is not adapted
    adds no rank.
    """
    found = {}
    for module in sorted(graph_modules(peft, packed)):
        parts = packed.get(module)
        a, b = (peft[module].a, peft[module].b) if parts is None else _pack(peft, parts)
        found[f"{module}.lora_A.weight"] = a
        found[f"{module}.lora_B.weight"] = b
    return found


def _pack(peft: Mapping[str, Lora], parts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    present = [peft[part] for part in parts if part in peft]
    a = np.concatenate([lora.a for lora in present], axis=1)  # parts [K, R] -> [K, sum of R]
    b = np.zeros((a.shape[1], sum(parts.values())), np.float32)  # [sum of R, sum of N]
    row = column = 0
    for part, n in parts.items():
        if part in peft:
            own = peft[part].b
            if own.shape[1] != n:
                raise ConfigError(f"adapter: {part}.lora_B.weight has {own.shape[1]} out channels, expected {n}")
            b[row : row + len(own), column : column + n] = own
            row += len(own)
        column += n
    return a, b


def convert(adapter: Path, onnx_folder: Path, out_file: Path) -> dict[str, tuple[int, ...]]:
    """Write a PEFT adapter as an ``.onnx_adapter`` file for a built folder; return its tensors' shapes.

    A misfit is refused. Inputs that the adapter has nothing for are left out: their default has rank 0.
    """
    packed, base = adapters.metadata(onnx_folder)
    check_base(adapter, base, str(onnx_folder))
    tensors = graph_tensors(read_peft(adapter), packed)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    adapters.check(shapes, onnx_folder, str(adapter))
    adapters.write(out_file, tensors)
    return shapes


def check_base(adapter: Path, base: str, where: str) -> None:
    """Refuse an adapter whose manifest names another base; without a manifest or a digest there is nothing to check."""
    trained_on = (read_manifest(adapter) or {}).get("base_digest")
    if trained_on and base and trained_on != base:
        raise ConfigError(f"{adapter}: trained on another base than {where} (base_digest {trained_on[:12]}, expected "
                          f"{base[:12]}); give the base that it was trained on")  # fmt: skip
