"""Write a quantized (or dequantized) checkpoint beside its source, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from olive.quant.affine import QuantizedWeight, fitting_group
from olive.quant.formats import FORMATS, gptq
from olive.quant.formats.shards import INDEX, ShardWriter

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data", ".h5", ".msgpack", ".ot")
NOT_COPIED = {"config.json", "quantize_config.json", "olive.json", INDEX, "pytorch_model.bin.index.json"}


class Grouping(NamedTuple):
    """How one linear layer is stored."""

    bits: int
    group_size: int


def choose_groups(
    shapes: Mapping[str, tuple[int, int]], method: str, bits: int, group_size: int
) -> dict[str, Grouping | None]:
    """Choose a group size per linear [N, K]; where the one asked for does not fit, AWQ leaves the layer float (None),
    GPTQ takes the largest smaller power of two that does."""
    chosen: dict[str, Grouping | None] = {}
    for module, (n, k) in shapes.items():
        size = group_size if method == "awq" else fitting_group(k, group_size)
        fits = size is not None and FORMATS[method].fits(n, k, bits, size)
        chosen[module] = Grouping(bits, k if size == -1 else size) if fits and size is not None else None
    return chosen


class CheckpointWriter:
    """Collects tensors into ``out``; :meth:`close` adds config.json and the files that are not weights."""

    def __init__(self, source: Path, out: Path, tensors: int = 100) -> None:
        """``tensors``: about how many will be written."""
        self.source, self.out = source, out
        self.shards = ShardWriter(out, tensors)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Write a float tensor."""
        self.shards.add(name, tensor)

    def quantized(self, module: str, weight: QuantizedWeight, method: str) -> None:
        """Write a linear layer's integers in the layout ``method``."""
        for part, tensor in FORMATS[method].pack(weight).items():
            self.shards.add(f"{module}.{part}", tensor)

    def close(self, config: Mapping[str, Any]) -> None:
        """Finish the weights; write ``config`` and copy tokenizer, generation settings and the like."""
        self.shards.close()
        (self.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in sorted(self.source.iterdir()):
            if path.is_file() and path.suffix not in WEIGHTS and path.name not in NOT_COPIED:
                shutil.copyfile(path, self.out / path.name)


def quantization_config(
    method: str, bits: int, group_size: int, symmetric: bool, modules: Mapping[str, Grouping | None]
) -> dict[str, Any]:
    """Return config.json's ``quantization_config`` for linears that are stored as in ``modules``."""
    return FORMATS[method].settings(bits, group_size, symmetric, modules)


def realised_bits(checkpoint: Any) -> dict[str, int]:
    """Read off a quantized checkpoint's files how many bits each linear really has: packed words over weights."""
    found = {}
    for module in checkpoint.quantized:
        n, k = checkpoint.linear_shape(module)
        words = checkpoint.tensors.shape(f"{module}.qweight")
        own = gptq.module_settings(checkpoint.settings, module)["bits"] if checkpoint.method == "gptq" else 4
        stored = words[0] * words[1] * 32 / (n * k)
        found[module] = int(stored) if stored == own else -1
    return found
