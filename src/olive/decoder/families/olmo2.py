"""OLMo 2: norms behind attention and MLP instead of before them, and on whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import Architecture, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

NAMES = Names(
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)
DEFAULTS = SHARED | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def olmo2(config: Mapping[str, Any]) -> Architecture:
    """The residual enters attention and MLP as it is."""
    return like_llama(Settings(config, DEFAULTS), names=NAMES, qk_norm="channels")
