"""A PEFT folder with a LoRA adapter, read strictly: what the graph cannot honour is refused.

Shape letters: N out channels, K in channels, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olive.decoder.source import WRAPPERS
from olive.errors import ConfigError
from olive.quant.formats.shards import Shards

PREFIX = "base_model.model."
IN_LAYER = re.compile(r".+\.\d+\..+")
REFUSED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "modules_to_save": "trained copies of whole modules",
    "lora_bias": "a bias in LoRA", "layer_replication": "repeated layers",
    "trainable_token_indices": "trained tokens", "target_parameters": "bare parameters as targets",
    "alora_invocation_tokens": "activated LoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow routing",
    "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
}  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start an adapter that change the base weights too."""


@dataclass(frozen=True)
class Lora:
    """One adapted linear: it adds ``x @ a @ b`` to its output."""

    a: np.ndarray
    """float32 [K, R]."""
    b: np.ndarray
    """float32 [R, N], times alpha / R."""


def read_peft(folder: Path, layers: str = "model.layers.") -> dict[str, Lora]:
    """Read a PEFT adapter folder; the keys are module paths of a text decoder that has its layers under ``layers``."""
    config = read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError(f"{folder}: no adapter_model.safetensors; save the adapter with PEFT's save_pretrained")
    tensors = Shards([file])
    found = {}
    for module in modules(tensors, folder):
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].float().numpy()  # [R, K]
        b = tensors[f"{PREFIX}{module}.lora_B.weight"].float().numpy()  # [N, R]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ConfigError(f"{folder}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit each "
                              "other, expected [R, K] and [N, R]; the adapter file is not whole")  # fmt: skip
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ConfigError(f"{folder}: {module}: holds NaN or infinity; train the adapter again")
        scale = _scale(config, module, a.shape[0])
        found[_plain(module, layers)] = Lora(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T) * np.float32(scale))
    return found


def _plain(module: str, layers: str) -> str:
    """Name a module as the text decoder does, whatever class the adapter was trained with: a model that also sees
    keeps its decoder apart, and in a model without lm_head nothing is in front of the layers."""
    base, _, bare = layers.partition(".")
    wrapper = next((w for w in WRAPPERS if module.startswith(w)), None)
    if wrapper is not None:
        return f"{base}.{module.removeprefix(wrapper)}"
    return f"{base}.{module}" if module.startswith(bare) else module


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and refuse what is not plain LoRA."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not a PEFT adapter folder (no adapter_config.json)") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type {kind!r} is not supported; only 'LORA'")
    for key, what in REFUSED.items():
        if config.get(key):
            raise ConfigError(f"{path}: {key} ({what}) is not supported; merge the adapter into its base instead")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{path}: bias {config['bias']!r} is not supported; only 'none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ConfigError(f"{path}: init_lora_weights {start!r} changes the base weights too; save the adapter with "
                          "save_pretrained(path_initial_model_for_weight_conversion=...) first")  # fmt: skip
    return config


def modules(tensors: Iterable[str], folder: Path) -> list[str]:
    """Return the modules that an adapter's tensors belong to; each must be a linear of a decoder layer."""
    found = []
    names = set(tensors)
    for name in sorted(names):
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if (not name.startswith(PREFIX) and ".lora_" in name) or part in ("A.default.weight", "B.default.weight"):
            raise ConfigError(f"{folder}: tensor {name}: not named as PEFT does ({PREFIX}MODULE.lora_A.weight); save "
                              "the adapter with PEFT's save_pretrained")  # fmt: skip
        if not name.startswith(PREFIX) or part not in ("A.weight", "B.weight") or not IN_LAYER.fullmatch(module):
            raise ConfigError(f"{folder}: tensor {name}: only LoRA on linears of the decoder layers is supported, not "
                              "on lm_head, embeddings or anything else; train without it as target")  # fmt: skip
        other = f"{PREFIX}{module}.lora_{'B' if part[0] == 'A' else 'A'}.weight"
        if other not in names:
            raise ConfigError(f"{folder}: tensor {name} has no partner {other}; the adapter file is not whole")
        if part[0] == "A":
            found.append(module)
    if not found:
        raise ConfigError(f"{folder}: the adapter file holds no tensors; save the adapter again")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    asked = _by_pattern(config, "rank_pattern", module, config.get("r", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigError(f"adapter_config.json: lora_alpha of {module}: expected a number, got {alpha!r}")
    if asked != rank:
        raise ConfigError(f"adapter_config.json: {module} should have rank {asked}, but its tensors have {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's path or a dotted tail of it."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"adapter_config.json: {key}: expected an object, got {type(patterns).__name__}")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
        except re.error as error:
            raise ConfigError(f"adapter_config.json: {key}: {pattern!r} is not a regular expression: {error}") from None
        if found:
            return value
    return default
