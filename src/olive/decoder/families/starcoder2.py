"""StarCoder2: Llama with LayerNorm, biases, an MLP without a gate and a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import FULL, Architecture, Names, Settings
from olive.decoder.families.llama import like_llama

NAMES = Names(gate_up=("mlp.c_fc",), down="mlp.c_proj")
DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "norm_epsilon": 1e-5,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "use_bias": True}  # fmt: skip


def starcoder2(config: Mapping[str, Any]) -> Architecture:
    """With ``use_bias`` every linear of a layer has one; a window, if given, is on every layer."""
    c = Settings(config, DEFAULTS)
    return like_llama(
        c,
        names=NAMES,
        windows=(c.get("sliding_window") or FULL,) * c.count("num_hidden_layers"),
        epsilon=c["norm_epsilon"],
        norm="layer",
        gated=False,
        biased=(*NAMES.qkv, NAMES.attention_out, *NAMES.gate_up, NAMES.down) if c["use_bias"] else (),
    )
