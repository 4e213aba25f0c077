"""Llama 2 and 3, SmolLM2, and Mistral; and what most other families share with Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import FULL, SLIDING, Architecture, Settings

SHARED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def like_llama(c: Settings, **differences: Any) -> Architecture:
    """Return the facts that a config states in Llama's words; ``differences`` replace them or add to them."""
    layers, heads = c.count("num_hidden_layers"), c.count("num_attention_heads")
    head_dim = c.get("head_dim") or c.count("hidden_size") // heads
    c.count("max_position_embeddings")
    facts: dict[str, Any] = {
        "name": c["model_type"],
        "layers": layers,
        "hidden": c.count("hidden_size"),
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "vocab": c.count("vocab_size"),
        "max_positions": c.count("max_position_embeddings"),
        "tied": c["tie_word_embeddings"],
        "windows": (FULL,) * layers,
    }
    if "ropes" not in differences:
        facts["ropes"] = (rope.read(c, head_dim),) * layers
    if "epsilon" not in differences:
        facts["epsilon"] = c["rms_norm_eps"]
    if "activation" not in differences:
        facts["activation"] = c.activation()
    return Architecture(**(facts | differences))


def llama(config: Mapping[str, Any]) -> Architecture:
    """Llama 2, 3, 3.1 to 3.3, SmolLM2 and everything else that calls itself llama."""
    return like_llama(Settings(config, SHARED | {"max_position_embeddings": 2048}), genai_type="llama")


def mistral(config: Mapping[str, Any]) -> Architecture:
    """Llama with a sliding window, on every layer unless ``layer_types`` says where (Ministral 8B)."""
    own = {"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8}
    c = Settings(config, SHARED | own)
    return like_llama(c, windows=c.windows([SLIDING] * c.count("num_hidden_layers")), genai_type="mistral")
