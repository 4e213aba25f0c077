"""The families of decoders that are built: one function each, from settings to an :class:`Architecture`.

To add a family, see docs/adding-a-family.md. Nothing outside this package tests for the name of a family.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import Architecture
from olive.errors import ConfigError, did_you_mean

FAMILIES = {
    "gemma2": "gemma:gemma2",
    "gemma3_text": "gemma:gemma3",
    "gpt2": "gpt2:gpt2",
    "gpt_neox": "gpt_neox:gpt_neox",
    "granite": "granite:granite",
    "llama": "llama:llama",
    "mistral": "llama:mistral",
    "mixtral": "mixtral:mixtral",
    "olmo2": "olmo2:olmo2",
    "opt": "opt:opt",
    "phi3": "phi3:phi3",
    "qwen2": "qwen:qwen2",
    "qwen3": "qwen:qwen3",
    "qwen3_moe": "qwen:qwen3_moe",
    "smollm3": "smollm3:smollm3",
    "stablelm": "stablelm:stablelm",
    "starcoder2": "starcoder2:starcoder2",
}
"""By ``model_type``: module of this package and function in it."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the text decoder: a model that also sees keeps them apart."""
    found = config.get("text_config")
    return found if isinstance(found, Mapping) else config


def is_built(config: Mapping[str, Any]) -> bool:
    """Whether a model's family is one of ours."""
    return text_config(config).get("model_type") in FAMILIES


def read(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json; what is not honoured is refused."""
    own = text_config(config)
    name = own.get("model_type", "")
    if name not in FAMILIES:
        raise ConfigError(f"config.json: model_type {name!r} is not built{did_you_mean(name, FAMILIES)}; "
                          f"families: {', '.join(FAMILIES)}")  # fmt: skip
    module, _, function = FAMILIES[name].partition(":")
    arch: Architecture = getattr(importlib.import_module(f"{__name__}.{module}"), function)(own)
    if arch.head_dim % 8:
        raise ConfigError(f"config.json: heads of {arch.head_dim} channels; ONNX Runtime takes multiples of 8")
    return arch
