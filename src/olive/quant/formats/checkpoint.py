"""A Hugging Face checkpoint folder, float or quantized, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError, did_you_mean
from olive.quant.affine import QuantizedWeight
from olive.quant.formats import FORMATS, gptq
from olive.quant.formats.shards import Shards, find


class Checkpoint:
    """Config and tensors of a checkpoint; quantized linears appear under their module name, not as packed tensors.

    ``float_names`` are the plain tensors, ``quantized`` the modules that hold integers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        paths = find(folder)
        if not paths:
            raise ConfigError(f"{folder}: no .safetensors files; convert other weights with transformers first")
        self.tensors = Shards(paths)
        self.settings: dict[str, Any] | None = self.config.get("quantization_config")
        method = (self.settings or {}).get("quant_method", "none")
        if self.settings and method not in FORMATS:
            raise ConfigError(f"{folder}: quantized as {method!r}, which is not read{did_you_mean(method, FORMATS)}")
        self.method: str | None = method if self.settings else None
        if self.method is not None:
            FORMATS[self.method].check(self.settings or {}, str(folder))
        parts = FORMATS[method].PARTS if self.settings else ()
        self.quantized = [n.removesuffix(".qweight") for n in self.tensors if parts and n.endswith(".qweight")]
        packed = {f"{module}.{part}" for module in self.quantized for part in parts}
        self.float_names = [name for name in self.tensors if name not in packed]

    def quantized_weight(self, module: str) -> QuantizedWeight:
        """Return the integers of a quantized linear layer."""
        if self.method is None or module not in self.quantized:
            raise KeyError(module)
        settings = self.settings or {}
        reader = FORMATS[self.method]
        parts = {p: self.tensors[f"{module}.{p}"] for p in reader.PARTS if f"{module}.{p}" in self.tensors}
        if self.method == "gptq":
            settings = gptq.module_settings(settings, module)
            if "g_idx" in parts:
                gptq.check_order(parts["g_idx"], settings["group_size"], f"{self.folder}: {module}")
        return reader.unpack(parts, settings)

    def weight(self, name: str) -> Tensor:
        """Return a float tensor by its name; ``X.weight`` of a quantized linear X comes back dequantized (float32)."""
        module = name.removesuffix(".weight")
        if module in self.quantized and name.endswith(".weight"):
            return self.quantized_weight(module).dequantize()
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or (name.endswith(".weight") and name.removesuffix(".weight") in self.quantized)

    def linear_shape(self, module: str) -> tuple[int, int]:
        """Return [N, K] of a linear layer, from headers alone."""
        if f"{module}.weight" in self.tensors:
            n, k = self.tensors.shape(f"{module}.weight")
            return n, k
        n = self.tensors.shape(f"{module}.scales")[1]
        rows = self.tensors.shape(f"{module}.qweight")[0]
        if self.method == "awq":
            return n, rows
        return n, rows * 32 // gptq.module_settings(self.settings or {}, module)["bits"]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the checkpoint, from the header alone."""
        return self.tensors.dtype(name)

    def dtype(self) -> torch.dtype:
        """Return the type of most of the float weights, as stored."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.float_names:
            dtype = self.tensors.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + self.tensors.nbytes(name)
        return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def longest(config: dict[str, Any]) -> int:
    """Return the most tokens that a model's positions allow, from its config."""
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not a Hugging Face checkpoint (no config.json)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object, got {type(config).__name__}")
    return config
