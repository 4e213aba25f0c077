"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, no gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import Architecture, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

NAMES = Names(
    layer="gpt_neox.layers.{}.",
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
DEFAULTS = SHARED | {
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "use_parallel_residual": True,
    "attention_bias": True, "rotary_pct": 0.25, "rotary_emb_base": 10000.0,
}  # fmt: skip


def gpt_neox(config: Mapping[str, Any]) -> Architecture:
    """Queries, keys and values are stored head by head."""
    c = Settings(config, DEFAULTS)
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    settings = {"rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]} | given
    head_dim = c.count("hidden_size") // c.count("num_attention_heads")
    attention = ("attention.query_key_value", "attention.dense") if c["attention_bias"] else ()
    return like_llama(
        c,
        names=NAMES,
        kv_heads=c.count("num_attention_heads"),
        ropes=(rope.read(c, head_dim, partial=True, settings=settings),) * c.count("num_hidden_layers"),
        epsilon=c["layer_norm_eps"],
        norm="layer",
        gated=False,
        parallel=c["use_parallel_residual"],
        qkv_by_head=True,
        biased=(*attention, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
