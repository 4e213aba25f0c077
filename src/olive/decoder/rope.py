"""Rotary position embedding: what a config says about it, and its tables of cosines and sines.

Shape letters: D head size, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError

READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", "short_mscale", "long_mscale"},
}
"""The rope types that are built, with the settings of each."""
OPTIONAL = {
    "attention_factor", "short_mscale", "long_mscale", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one model."""

    kind: str
    theta: float
    rotary_dim: int
    """Channels of a head that are rotated; the rest pass unchanged."""
    trained: int
    """Positions that the model has; longrope scales its tables by them."""
    rows: int
    """Positions that the tables are for."""
    original: int
    """Positions seen in pretraining; longrope changes its factors beyond them, llama3 scales by them."""
    settings: Mapping[str, Any]

    def switches(self) -> bool:
        """Whether sequences longer than ``original`` use another table."""
        return self.kind == "longrope" and self.rows > self.original

    def table(self, *, long: bool = False) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [P, rotary_dim / 2] each; ``long``: for sequences beyond ``original``.

        Angles are float32 products as in transformers, so that positions far out agree with it.
        """
        frequency, scale = self._frequencies(long=long)
        rows = self.original if self.switches() and not long else self.rows
        angle = torch.arange(rows, dtype=torch.float32)[:, None] * frequency  # [P, 1] * [D / 2] -> [P, D / 2]
        return angle.cos().mul_(scale), angle.sin().mul_(scale)

    def _frequencies(self, *, long: bool) -> tuple[Tensor, float]:
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        if self.kind == "longrope":
            return self._longrope(exponent, long=long)
        frequency = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return frequency / self.settings["factor"], 1.0
        if self.kind == "llama3":
            return self._llama3(frequency), 1.0
        if self.kind == "yarn":
            return self._yarn(frequency)
        return frequency, 1.0

    def _longrope(self, exponent: Tensor, *, long: bool) -> tuple[Tensor, float]:
        """LongRoPE (Ding et al., 2024): one factor per frequency, another set beyond the original length."""
        name = "long" if long else "short"
        factors = torch.tensor(self.settings[f"{name}_factor"], dtype=torch.float32)
        if len(factors) != len(exponent):
            raise ConfigError(f"config.json: {name}_factor has {len(factors)} values, expected {len(exponent)}")
        ratio = self.settings.get("factor") or self.trained / self.original
        scale = math.sqrt(1 + math.log(ratio) / math.log(self.original)) if ratio > 1 else 1.0
        for key in ("attention_factor", f"{name}_mscale"):
            if self.settings.get(key) is not None:
                scale = float(self.settings[key])
        return 1.0 / (factors * self.theta**exponent), scale

    def _llama3(self, frequency: Tensor) -> Tensor:
        """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a smooth passage between."""
        factor, low, high = (self.settings[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
        wavelength = 2 * math.pi / frequency
        smooth = (self.original / wavelength - low) / (high - low)
        between = (1 - smooth) * frequency / factor + smooth * frequency
        scaled = torch.where(wavelength > self.original / low, frequency / factor, between)
        return torch.where(wavelength < self.original / high, frequency, scaled)

    def _yarn(self, frequency: Tensor) -> tuple[Tensor, float]:
        """YaRN (Peng et al., arXiv 2309.00071, 2023): slow frequencies divided by ``factor``, fast ones kept, a ramp
        between; the table is scaled by what the paper calls the attention temperature."""
        given = self.settings
        factor, half = given["factor"], len(frequency)

        def channel(rotations: float) -> float:
            return half * math.log(self.original / (rotations * 2 * math.pi)) / math.log(self.theta)

        low, high = channel(given.get("beta_fast") or 32), channel(given.get("beta_slow") or 1)
        if given.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        slow = ((torch.arange(half, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)

        def temperature(weight: float = 1.0) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        scale = given.get("attention_factor")
        if scale is None:
            own, other = given.get("mscale"), given.get("mscale_all_dim")
            scale = temperature(own) / temperature(other) if own and other else temperature()
        return frequency / factor * slow + frequency * (1 - slow), float(scale)


def read(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    settings: Mapping[str, Any] | None = None,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
) -> Rope:
    """Read a config's rope settings, as ``rope_parameters`` or in the older spelling ``rope_scaling``, or those given.

    ``partial``: the family honours ``partial_rotary_factor``; ``aliases``: its older names of rope types;
    ``original``: its pretraining length where the config gives none beside the rope's settings.
    """
    if settings is None:
        settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    settings = {k: v for k, v in settings.items() if v is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    if kind not in FIELDS:
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; built are {', '.join(FIELDS)}")
    unread = sorted(set(settings) - READ - FIELDS[kind])
    if unread:
        raise ConfigError(f"config.json: rope setting {unread[0]!r} is not understood for rope type {kind!r}")
    needed = FIELDS[kind] - OPTIONAL
    if kind == "longrope":
        needed -= {"factor"}
    missing = sorted(needed - set(settings))
    if missing:
        raise ConfigError(f"config.json: rope type {kind!r} needs {missing[0]!r}, which is not given")
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not partial:
        raise ConfigError(f"config.json: partial_rotary_factor {share} is not supported for {config['model_type']}")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 16:
        raise ConfigError(f"config.json: {rotary_dim} rotated channels per head; ONNX Runtime takes multiples of 16")
    positions = config["max_position_embeddings"]
    key = "original_max_position_embeddings"
    length = config.get(key) or original or settings.get(key) or positions  # in the order of transformers
    theta = settings.get("rope_theta", config.get("rope_theta") or 10000.0)
    return Rope(kind, float(theta), rotary_dim, positions, positions, length, settings)
