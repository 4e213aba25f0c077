"""The facts of one decoder that its graph is built from, and config.json as a family reads it.

The defaults are those of Llama; a family says where it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from olive.decoder.rope import Rope
from olive.errors import ConfigError

FULL = -1
"""Window of a layer that sees all earlier tokens."""
SLIDING, WHOLE = "sliding_attention", "full_attention"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
"""By the names that configs use."""


@dataclass(frozen=True)
class Names:
    """Where a checkpoint keeps its modules. Those of a layer are without its prefix; "" where there is none."""

    layer: str = "model.layers.{}."
    embeddings: str = "model.embed_tokens"
    positions: str = ""
    """Learned position embeddings."""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = QKV
    """Queries, keys and values in this order, or one module that holds them all."""
    attention_out: str = "self_attn.o_proj"
    q_norm: str = ""
    k_norm: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up, one module that holds both, or up alone where nothing is gated."""
    down: str = "mlp.down_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    """A norm of what attention adds, before it is added."""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    @property
    def base(self) -> str:
        """What transformers puts in front of all names but the head's, and some checkpoints leave out."""
        return self.layer.partition(".")[0] + "."


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP: ``down(act(gate x) * up x)`` of the chosen ones, weighted."""

    count: int
    chosen: int
    normalized: bool
    """The weights of the chosen experts are made to add up to 1."""
    layers: tuple[bool, ...]
    """Layers that have experts; the others have an MLP."""
    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True)
class Architecture:
    """What sets one decoder apart; shape letters as in the conventions."""

    name: str
    """``model_type`` of the family."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    """lm_head is the embeddings."""
    epsilon: float
    ropes: tuple[Rope | None, ...]
    """By layer; None: no rotation."""
    windows: tuple[int, ...]
    """By layer: how many tokens back attention sees, or FULL."""
    activation: Activation
    names: Names = field(default_factory=Names)
    genai_type: str = ""
    """What GenAI calls the family, where it knows it; ``decoder`` does for every other."""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """Added to the norms' stored weights."""
    qk_norm: Literal["heads", "channels"] = "heads"
    """Whether queries and keys, if they have norms, are normalized head by head or as a whole."""
    gated: bool = True
    parallel: bool = False
    """Attention and MLP read the same input; their outputs are added to it together."""
    qkv_by_head: bool = False
    """The packed module holds queries, keys and values of one head after the other."""
    transposed: bool = False
    """Weights of a layer's linears are stored as [K, N]."""
    biased: tuple[str, ...] = ()
    """Linears of a layer that always have a bias."""
    attention_scale: float = 0.0
    """Factor of q k; 0: 1 / sqrt(D)."""
    attention_softcap: float = 0.0
    first_position: int = 0
    """Row of the learned position embeddings that the first token takes."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the residual."""
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    experts: Experts | None = None

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's modules."""
        return self.names.layer.format(layer)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.experts is not None and self.experts.layers[layer]

    def qkv_module(self) -> str:
        """Module of the graph that gives queries, keys and values."""
        qkv = self.names.qkv
        return qkv[0] if len(qkv) == 1 else qkv[0].rpartition(".")[0] + ".qkv_proj"

    def mlp_linears(self, layer: int) -> list[str]:
        """Linears of a layer's MLP or experts, without the layer's prefix; the router is not among them."""
        if self.experts is None or not self.has_experts(layer):
            return [*self.names.gate_up, self.names.down]
        each = (self.experts.gate, self.experts.up, self.experts.down)
        return [name.format(i) for i in range(self.experts.count) for name in each]

    def linears(self, layer: int) -> list[str]:
        """Linears of a layer, without its prefix."""
        return [*self.names.qkv, self.names.attention_out, *self.mlp_linears(layer)]

    def norms(self) -> list[str]:
        """Norms of a layer, without its prefix."""
        names = self.names
        own = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp,
               names.q_norm, names.k_norm)  # fmt: skip
        return [name for name in own if name]


class Settings(Mapping[str, Any]):
    """A config.json over a family's defaults; null counts as not given."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._given = dict(defaults) | {k: v for k, v in config.items() if v is not None}
        if "sliding_window" in config:  # null means no window, not the default one
            self._given["sliding_window"] = config["sliding_window"]

    def __getitem__(self, key: str) -> Any:
        if key not in self._given:
            raise ConfigError(f"config.json: {key}: required, but not given")
        return self._given[key]

    def __contains__(self, key: object) -> bool:
        return key in self._given

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or ``default`` where neither the config nor the family gives one."""
        return self._given.get(key, default)

    def count(self, key: str) -> int:
        """Return a setting that must be a whole number."""
        if not isinstance(self[key], int):
            raise ConfigError(f"config.json: {key}: expected a whole number, got {self[key]!r}")
        return int(self[key])

    def only(self, key: str, allowed: Any) -> None:
        """Refuse a setting other than the one that is built."""
        if self.get(key, allowed) != allowed:
            raise ConfigError(f"config.json: {key} {self[key]!r} is not supported for {self['model_type']}; "
                              f"only {allowed!r}")  # fmt: skip

    def activation(self, key: str = "hidden_act") -> Activation:
        """Return the activation under one of our names."""
        given = self[key]
        if given not in ACTIVATIONS:
            raise ConfigError(f"config.json: {key} {given!r} is not supported for {self['model_type']}; only "
                              f"{', '.join(ACTIVATIONS)}")  # fmt: skip
        return ACTIVATIONS[given]

    def windows(self, pattern: Sequence[str]) -> tuple[int, ...]:
        """Return each layer's window: ``layer_types`` says which have one, or else ``pattern``."""
        layers = self.count("num_hidden_layers")
        types = self.get("layer_types") or list(pattern)
        unknown = sorted(set(types) - {SLIDING, WHOLE})
        if unknown or len(types) != layers:
            raise ConfigError(f"config.json: layer_types {unknown or len(types)}: expected one of {SLIDING}, "
                              f"{WHOLE} for each of {layers} layers")  # fmt: skip
        window = self.get("sliding_window")
        return tuple(window if window and kind == SLIDING else FULL for kind in types)
