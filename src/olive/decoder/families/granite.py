"""Granite 3 dense models: Llama with multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olive.decoder.architecture import Architecture, Settings
from olive.decoder.families.llama import SHARED, like_llama

DEFAULTS = SHARED | {
    "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
    "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip


def granite(config: Mapping[str, Any]) -> Architecture:
    """Multipliers on embeddings, attention, what is added to the residual, and logits."""
    c = Settings(config, DEFAULTS)
    return like_llama(
        c,
        embedding_scale=c["embedding_multiplier"],
        attention_scale=c["attention_multiplier"],
        residual_scale=c["residual_multiplier"],
        logit_scale=1 / c["logits_scaling"],
        genai_type="granite",
    )
