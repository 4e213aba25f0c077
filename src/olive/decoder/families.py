"""The families of decoders that are built, each as a short declaration, and what a config.json says in them.

To add a family: declare it here; if it has a block of its own, write the block and let a fact switch it on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from olive.decoder import rope
from olive.decoder.rope import Rope
from olive.errors import ConfigError

FULL = -1
"""Window of a layer that sees all earlier tokens."""


def window_everywhere(config: Mapping[str, Any]) -> list[int]:
    """Every layer has the config's ``sliding_window``, if it has one."""
    return [config.get("sliding_window") or FULL] * config["num_hidden_layers"]


def window_by_layer(config: Mapping[str, Any]) -> list[int]:
    """Qwen: off unless ``use_sliding_window``; then by ``layer_types``, or from layer ``max_window_layers`` on."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config["max_window_layers"]
    pattern = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    types = config.get("layer_types") or pattern
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers:
        raise ConfigError(f"config.json: layer_types {unknown or len(types)}: expected one of sliding_attention, "
                          f"full_attention for each of {layers} layers")  # fmt: skip
    return [window if window and kind == "sliding_attention" else FULL for kind in types]


def no_window(config: Mapping[str, Any]) -> list[int]:
    """Every layer sees all earlier tokens."""
    return [FULL] * config["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """What sets a family apart from Llama."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where config.json is silent."""
    windows: Callable[[Mapping[str, Any]], list[int]] = no_window
    packed: bool = False
    """The checkpoint stores q, k, v in one matrix (qkv_proj), gate and up in another (gate_up_proj)."""
    qk_norm: bool = False
    """Queries and keys are normalized per head before they are rotated."""
    biased: tuple[str, ...] = ()
    """Linears of a layer that always have a bias."""
    partial_rotary: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    original_positions: int | None = None


SHARED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QWEN = {"max_window_layers": 28, "sliding_window": 4096, "max_position_embeddings": 32768}

FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        defaults={"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8},
        windows=window_everywhere,
    ),
    "phi3": Family(
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows=window_everywhere,
        packed=True,
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        original_positions=4096,
    ),
    "qwen2": Family(defaults=QWEN, windows=window_by_layer, biased=QKV),
    "qwen3": Family(defaults=QWEN | {"head_dim": 128}, windows=window_by_layer, qk_norm=True),
}
"""By ``model_type``; GenAI knows each of them by the same name."""


@dataclass(frozen=True)
class Architecture:
    """The facts of one model that its graph is built from."""

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    epsilon: float
    max_positions: int
    tied: bool
    windows: tuple[int, ...]
    rope: Rope

    def attention_parts(self) -> tuple[str, ...]:
        """Linears of a layer that give queries, keys and values, in this order."""
        return ("self_attn.qkv_proj",) if self.family.packed else QKV

    def gate_up(self) -> tuple[str, ...]:
        """Linears of a layer that give the MLP's gate and up values."""
        return ("mlp.gate_up_proj",) if self.family.packed else ("mlp.gate_proj", "mlp.up_proj")

    def linears(self) -> list[str]:
        """Linears of a layer, without its prefix."""
        return [*self.attention_parts(), "self_attn.o_proj", *self.gate_up(), "mlp.down_proj"]

    def norms(self) -> list[str]:
        """Norms of a layer, without its prefix."""
        own = ["self_attn.q_norm", "self_attn.k_norm"] if self.family.qk_norm else []
        return ["input_layernorm", "post_attention_layernorm", *own]

    def packing(self) -> dict[str, tuple[str, ...]]:
        """Modules of a layer that the graph computes in one product, with the checkpoint's linears in each."""
        return {} if self.family.packed else {"self_attn.qkv_proj": QKV}


def read(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json; what is not honoured is refused."""
    name = config.get("model_type", "")
    family = FAMILIES.get(name)
    if family is None:
        raise ConfigError(f"config.json: model_type {name!r} is not built; families: {', '.join(FAMILIES)}")
    given: dict[str, Any] = SHARED | dict(family.defaults) | {k: v for k, v in config.items() if v is not None}
    if "sliding_window" in config:  # null means no window, not the default one
        given["sliding_window"] = config["sliding_window"]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if not isinstance(given.get(key), int):
            raise ConfigError(f"config.json: {key}: required, but not given" if key not in given else
                              f"config.json: {key}: expected a whole number, got {given[key]!r}")  # fmt: skip
    if given["hidden_act"] != "silu":
        raise ConfigError(f"config.json: hidden_act {given['hidden_act']!r} is not supported for {name}; only 'silu'")
    heads = given["num_attention_heads"]
    head_dim = given.get("head_dim") or given["hidden_size"] // heads
    return Architecture(
        name=name,
        family=family,
        layers=given["num_hidden_layers"],
        hidden=given["hidden_size"],
        heads=heads,
        kv_heads=given.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab=given["vocab_size"],
        epsilon=given["rms_norm_eps"],
        max_positions=given["max_position_embeddings"],
        tied=given["tie_word_embeddings"],
        windows=tuple(family.windows(given)),
        rope=rope.read(
            given,
            head_dim,
            partial=family.partial_rotary,
            aliases=family.rope_aliases,
            original=family.original_positions,
        ),
    )
