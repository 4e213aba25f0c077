"""SmolLM3: Llama with layers that do not rotate (NoPE; Yang et al., arXiv 2501.18795, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import FULL, SLIDING, WHOLE, Architecture, Settings
from olive.decoder.families.llama import SHARED, like_llama
from olive.errors import ConfigError

DEFAULTS = SHARED | {
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6,
    "no_rope_layer_interval": 4, "sliding_window": None,
}  # fmt: skip


def smollm3(config: Mapping[str, Any]) -> Architecture:
    """``no_rope_layers`` is 1 where a layer rotates; a window, if one is switched on, is for the others, but
    ``layer_types`` goes before both."""
    c = Settings(config, DEFAULTS)
    layers, every = c.count("num_hidden_layers"), c["no_rope_layer_interval"]
    rotated = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if len(rotated) < layers:
        raise ConfigError(f"config.json: no_rope_layers has {len(rotated)} values for {layers} layers")
    head_dim = c.get("head_dim") or c.count("hidden_size") // c.count("num_attention_heads")
    table = rope.read(c, head_dim)
    windows = c.windows([WHOLE if rotates else SLIDING for rotates in rotated[:layers]])
    return like_llama(
        c,
        ropes=tuple(table if rotates else None for rotates in rotated[:layers]),
        windows=windows if c.get("layer_types") or c.get("use_sliding_window") else (FULL,) * layers,
        genai_type="smollm3",
    )
