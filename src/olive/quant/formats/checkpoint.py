"""A Hugging Face checkpoint folder, float or quantized, read one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError, did_you_mean
from olive.quant.affine import QuantizedWeight
from olive.quant.formats import FORMATS
from olive.quant.formats.layout import Layout
from olive.quant.formats.shards import Shards, find

BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Ends of names of tensors that older checkpoints hold and nobody reads."""
CODES = {layout.PARTS[0] for layout in FORMATS.values()}


class Checkpoint:
    """Config and tensors of a checkpoint; quantized weights appear under their module name, not as packed tensors.

    ``float_names`` are the plain tensors, ``quantized`` the modules that hold integers; among these may be the
    embeddings and lm_head. A tied lm_head that is not stored is in neither.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        paths = find(folder)
        if not paths:
            raise ConfigError(f"{folder}: no .safetensors files; convert other weights with transformers first")
        self.tensors = Shards(paths)
        self.settings: dict[str, Any] = self.config.get("quantization_config") or {}
        method = self.settings.get("quant_method", "none")
        if self.settings and method not in FORMATS:
            raise ConfigError(f"{folder}: quantized as {method!r}, which is not read{did_you_mean(method, FORMATS)}")
        self.method: str | None = method if self.settings else None
        self.layout: Layout | None = FORMATS[method] if self.settings else None
        parts: tuple[str, ...] = ()
        if self.layout:
            self.layout.check(self.settings, str(folder))
            parts = self.layout.PARTS
        self.quantized = [n.removesuffix(f".{parts[0]}") for n in self.tensors if parts and n.endswith(f".{parts[0]}")]
        if parts and not self.quantized:
            raise ConfigError(f"{folder}: quantized as {method!r} by config.json, but no tensor is named *.{parts[0]}; "
                              "fetch the checkpoint again")  # fmt: skip
        if not self.settings and (found := next((n for n in self.tensors if n.rpartition(".")[2] in CODES), None)):
            raise ConfigError(f"{folder}: tensor {found} holds packed integers, but config.json has no "
                              "quantization_config; older tools wrote it as compression_config or to a file of its own "
                              "(quantize_config.json, quant_config.json): put it into config.json, with quant_method "
                              f"as one of {', '.join(FORMATS)}")  # fmt: skip
        self._quantized = frozenset(self.quantized)  # a model of experts has thousands
        packed = {f"{module}.{part}" for module in self.quantized for part in parts}
        self.float_names = [name for name in self.tensors if name not in packed]

    def module_settings(self, module: str) -> dict[str, Any]:
        """Return how a quantized module is stored, in its layout's own words; ``bits`` is always among them."""
        return self._layout(module).module_settings(self.settings, module)

    def quantized_weight(self, module: str) -> QuantizedWeight:
        """Return the integers of a quantized module's weight."""
        layout = self._layout(module)
        parts = {p: self.tensors[f"{module}.{p}"] for p in layout.PARTS if f"{module}.{p}" in self.tensors}
        try:
            own = self.module_settings(module)
            found = layout.unpack(parts, own, f"{self.folder}: {module}")
        except KeyError as error:
            raise self._missing(module, error) from None
        (n, k), scales, zeros = found.codes.shape, tuple(found.scale.shape), tuple(found.zero_point.shape)
        size = own.get("group_size") or -1
        if scales != zeros or scales[0] != n or k % scales[1] or size not in (-1, k // scales[1]):
            raise ConfigError(f"{self.folder}: {module}: codes {(n, k)} in groups of {size}, scales {scales} and zero "
                              f"points {zeros} do not fit; see whether quantization_config in config.json tells the "
                              "right bits and group size")  # fmt: skip
        if found.scale.dtype == torch.bfloat16:  # exact in float32, not in float16
            found = replace(found, scale=found.scale.float())
        return found

    def _layout(self, module: str) -> Layout:
        if self.layout is None or module not in self._quantized:
            raise KeyError(module)
        return self.layout

    def weight(self, name: str) -> Tensor:
        """Return a float tensor by its name; ``X.weight`` of a quantized module X comes back dequantized (float32)."""
        module = name.removesuffix(".weight")
        if module in self._quantized and name.endswith(".weight"):
            return self.quantized_weight(module).dequantize()
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or (name.endswith(".weight") and name.removesuffix(".weight") in self._quantized)

    def linear_shape(self, module: str) -> tuple[int, int]:
        """Return [N, K] of a linear layer or a table, without reading its weight."""
        if f"{module}.weight" in self.tensors:
            n, k = self.tensors.shape(f"{module}.weight")
            return n, k
        layout = self._layout(module)
        try:
            return layout.shape(module, self.tensors, self.module_settings(module))
        except KeyError as error:
            raise self._missing(module, error) from None

    def _missing(self, module: str, error: KeyError) -> ConfigError:
        what = str(error.args[0]).removeprefix(f"{module}.")
        return ConfigError(f"{self.folder}: {module}: {what} is missing, among its tensors or in config.json; fetch "
                           "the checkpoint again")  # fmt: skip

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.tensors.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a float tensor alone."""
        return self.tensors.rows(name, start, stop)

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
    config = config.get("text_config") or config  # of a model that also sees
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
