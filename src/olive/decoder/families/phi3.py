"""Phi-3, 3.5, 4 and 4-mini."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import FULL, Architecture, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

NAMES = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
DEFAULTS = SHARED | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def phi3(config: Mapping[str, Any]) -> Architecture:
    """Packed linears, longrope beyond 4096 tokens, a part of each head rotated."""
    c = Settings(config, DEFAULTS)
    layers = c.count("num_hidden_layers")
    head_dim = c.get("head_dim") or c.count("hidden_size") // c.count("num_attention_heads")
    aliases = {"su": "longrope", "yarn": "longrope"}
    table = rope.read(c, head_dim, partial=True, aliases=aliases, original=4096)
    windows = (c.get("sliding_window") or FULL,) * layers
    return like_llama(c, names=NAMES, ropes=(table,) * layers, windows=windows, genai_type="phi3")
