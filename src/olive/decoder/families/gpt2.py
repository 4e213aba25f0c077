"""GPT-2: learned positions, LayerNorm, weights stored transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import FULL, Architecture, Names, Settings

NAMES = Names(
    layer="transformer.h.{}.",
    embeddings="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    before_attention="ln_1",
    before_mlp="ln_2",
)
DEFAULTS = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
            "tie_word_embeddings": True, "scale_attn_weights": True}  # fmt: skip


def gpt2(config: Mapping[str, Any]) -> Architecture:
    """No rotation, and a bias on every linear."""
    c = Settings(config, DEFAULTS)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    layers, heads = c.count("n_layer"), c.count("n_head")
    return Architecture(
        name="gpt2",
        layers=layers,
        hidden=c.count("n_embd"),
        heads=heads,
        kv_heads=heads,
        head_dim=c.count("n_embd") // heads,
        vocab=c.count("vocab_size"),
        max_positions=c.count("n_positions"),
        tied=c["tie_word_embeddings"],
        epsilon=c["layer_norm_epsilon"],
        ropes=(None,) * layers,
        windows=(FULL,) * layers,
        activation=c.activation("activation_function"),
        names=NAMES,
        norm="layer",
        gated=False,
        transposed=True,
        attention_scale=0.0 if c["scale_attn_weights"] else 1.0,
        biased=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    )
