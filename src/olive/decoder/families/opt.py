"""OPT: learned positions that begin at row 2, LayerNorm, ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import QKV, Architecture, Names, Settings
from olive.decoder.families.llama import like_llama

NAMES = Names(
    layer="model.decoder.layers.{}.",
    embeddings="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    attention_out="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
    before_attention="self_attn_layer_norm",
    before_mlp="final_layer_norm",
)
DEFAULTS = {"max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True,
            "enable_bias": True}  # fmt: skip


def opt(config: Mapping[str, Any]) -> Architecture:
    """All sizes but the 350 M one, whose norms lie behind and whose embeddings are narrower."""
    c = Settings(config, DEFAULTS)
    c.only("do_layer_norm_before", True)
    c.only("_remove_final_layer_norm", False)
    c.only("layer_norm_elementwise_affine", True)
    c.only("word_embed_proj_dim", c["hidden_size"])
    return like_llama(
        c,
        names=NAMES,
        kv_heads=c.count("num_attention_heads"),
        ropes=(None,) * c.count("num_hidden_layers"),
        epsilon=1e-5,
        activation=c.activation("activation_function"),
        norm="layer",
        gated=False,
        first_position=2,
        biased=(*QKV, "self_attn.out_proj", "fc1", "fc2") if c["enable_bias"] else (),
    )
