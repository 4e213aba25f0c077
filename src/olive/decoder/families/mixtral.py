"""Mixtral: Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import FULL, Architecture, Experts, Settings
from olive.decoder.families.llama import SHARED, like_llama

DEFAULTS = SHARED | {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None,
    "num_experts_per_tok": 2, "num_local_experts": 8, "rope_theta": 1e6,
}  # fmt: skip


def mixtral(config: Mapping[str, Any]) -> Architecture:
    """Every layer has experts, named w1 (gate), w3 (up) and w2 (down)."""
    c = Settings(config, DEFAULTS)
    layers = c.count("num_hidden_layers")
    experts = Experts(
        count=c.count("num_local_experts"),
        chosen=c.count("num_experts_per_tok"),
        normalized=True,
        layers=(True,) * layers,
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{}.w1",
        up="block_sparse_moe.experts.{}.w3",
        down="block_sparse_moe.experts.{}.w2",
    )
    return like_llama(c, windows=(c["sliding_window"] or FULL,) * layers, experts=experts)
