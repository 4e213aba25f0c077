"""StableLM: Llama with LayerNorm and a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import QKV, Architecture, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

DEFAULTS = SHARED | {"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25}


def stablelm(config: Mapping[str, Any]) -> Architecture:
    """With ``use_parallel_residual`` the MLP reads what attention reads."""
    c = Settings(config, DEFAULTS)
    c.only("qk_layernorm", False)
    parallel = bool(c.get("use_parallel_residual"))
    head_dim = c.count("hidden_size") // c.count("num_attention_heads")
    names = Names()
    return like_llama(
        c,
        names=replace(names, before_mlp="") if parallel else names,
        ropes=(rope.read(c, head_dim, partial=True),) * c.count("num_hidden_layers"),
        epsilon=c["layer_norm_eps"],
        norm="layer",
        parallel=parallel,
        biased=QKV if c.get("use_qkv_bias") else (),
    )
