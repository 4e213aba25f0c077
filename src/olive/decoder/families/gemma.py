"""Gemma 2 and 3, the text decoder: norms before and after, scaled embeddings, local and global layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from olive.decoder import rope
from olive.decoder.architecture import SLIDING, WHOLE, Architecture, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

NAMES = Names(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
SHAPE = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
         "sliding_window": 4096, "tie_word_embeddings": True, "num_key_value_heads": 4}  # fmt: skip

SIZES = {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
         "max_position_embeddings": 131072}  # fmt: skip
"""Of Gemma 3: the configs of those that see, as Google gives them, leave out what is the default."""


def _gemma(c: Settings, every: int, **differences: Any) -> Architecture:
    """All layers have a window but each ``every``-th."""
    c.only("use_bidirectional_attention", False)
    layers = c.count("num_hidden_layers")
    return like_llama(
        c,
        windows=c.windows([WHOLE if (i + 1) % every == 0 else SLIDING for i in range(layers)]),
        activation=c.activation("hidden_activation"),
        norm_offset=1.0,
        attention_scale=c["query_pre_attn_scalar"] ** -0.5,
        embedding_scale=math.sqrt(c.count("hidden_size")),
        attention_softcap=c.get("attn_logit_softcapping") or 0.0,
        logit_softcap=c.get("final_logit_softcapping") or 0.0,
        **differences,
    )


def gemma2(config: Mapping[str, Any]) -> Architecture:
    """Soft caps on attention and logits; every other layer is local. A cap of null is none."""
    own: dict[str, Any] = {"max_position_embeddings": 8192}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    own |= {name: value for name, value in caps.items() if name not in config}
    return _gemma(Settings(config, SHARED | SHAPE | own), 2, names=NAMES, genai_type="gemma2")


def gemma3(config: Mapping[str, Any]) -> Architecture:
    """Norms on heads; one layer in six is global, with a rope of its own."""
    c = Settings(config, SHARED | SHAPE | SIZES)
    c.only("attn_logit_softcapping", None)  # transformers has the setting, and does not read it
    names = replace(NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    every = c.get("sliding_window_pattern") or 6
    layers = c.count("num_hidden_layers")
    types = c.get("layer_types") or [WHOLE if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    given = c.get("rope_parameters") or {}
    nested = given if {SLIDING, WHOLE} & given.keys() else {}
    flat = {"rope_theta": 1e6} | dict(c.get("rope_scaling") or {}) | ({} if nested else given)
    flat |= {"rope_theta": c["rope_theta"]} if "rope_theta" in c else {}
    local = {"rope_theta": c.get("rope_local_base_freq", 10000.0)}
    ropes = {
        WHOLE: rope.read(c, c["head_dim"], settings=flat | (nested.get(WHOLE) or {})),
        SLIDING: rope.read(c, c["head_dim"], settings=local | (nested.get(SLIDING) or {})),
    }
    by_layer = tuple(ropes[kind] for kind in types if kind in ropes)
    return _gemma(c, every, names=names, ropes=by_layer, genai_type="gemma3_text")
