"""Qwen2 and 2.5, Qwen3, and Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import FULL, QKV, SLIDING, WHOLE, Architecture, Experts, Names, Settings
from olive.decoder.families.llama import SHARED, like_llama

DEFAULTS = SHARED | {"max_window_layers": 28, "sliding_window": 4096, "max_position_embeddings": 32768}
NORMED = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _windows(c: Settings) -> tuple[int, ...]:
    """Off unless ``use_sliding_window``; then by ``layer_types``, or from layer ``max_window_layers`` on."""
    layers = c.count("num_hidden_layers")
    first = min(c["max_window_layers"], layers)
    found = c.windows([WHOLE] * first + [SLIDING] * (layers - first))
    return found if c.get("use_sliding_window") else (FULL,) * layers


def qwen2(config: Mapping[str, Any]) -> Architecture:
    """Llama with biases on queries, keys and values."""
    c = Settings(config, DEFAULTS)
    return like_llama(c, windows=_windows(c), biased=QKV, genai_type="qwen2")


def qwen3(config: Mapping[str, Any]) -> Architecture:
    """Llama with norms on the heads of queries and keys."""
    c = Settings(config, DEFAULTS | {"head_dim": 128})
    return like_llama(c, windows=_windows(c), names=NORMED, genai_type="qwen3")


def qwen3_moe(config: Mapping[str, Any]) -> Architecture:
    """Qwen3 with experts on the layers that ``decoder_sparse_step`` and ``mlp_only_layers`` leave them."""
    own = {"num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False, "decoder_sparse_step": 1,
           "mlp_only_layers": []}  # fmt: skip
    c = Settings(config, DEFAULTS | own)
    step, without = c["decoder_sparse_step"], c["mlp_only_layers"]
    layers = range(c.count("num_hidden_layers"))
    experts = Experts(
        count=c.get("num_local_experts") or c.count("num_experts"),
        chosen=c.count("num_experts_per_tok"),
        normalized=c["norm_topk_prob"],
        layers=tuple(i not in without and (i + 1) % step == 0 for i in layers),
    )
    window = c.get("sliding_window") if c.get("use_sliding_window") else None  # on every layer, unlike in Qwen2 and 3
    return like_llama(c, windows=(window or FULL,) * len(layers), names=NORMED, experts=experts)
