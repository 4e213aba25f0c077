"""The blocks of a decoder layer: attention with a cache, and the gated MLP.

Shape letters: B batch, T tokens, H heads, D head size, K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from olive.decoder.families import Architecture
from olive.decoder.graph import Graph
from olive.decoder.linear import Linears
from olive.decoder.norm import Norms


@dataclass(frozen=True)
class Positions:
    """What attention must know of the positions, the same for every layer."""

    last: ir.Value
    """int32 [B, 1]: position of the last token of each row."""
    total: ir.Value
    """int32 scalar: tokens so far, with those of this run."""
    cos: ir.Value
    sin: ir.Value


def positions(graph: Graph, arch: Architecture) -> Positions:
    """Add the attention mask input and derive positions from it; padding must be on the right."""
    mask = graph.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    axis = graph.constant("mask_axis", np.array([1], np.int64))
    one = graph.constant("one", np.array(1, np.int64))
    seen = graph.op("ReduceSum", [mask, axis], "positions.Sum", {"keepdims": 1})
    before = graph.op("Sub", [seen, one], "positions.Sub")
    last = graph.op("Cast", [before], "positions.last", {"to": ir.DataType.INT32})
    shape = graph.op("Shape", [mask], "positions.Shape", {"start": 1, "end": 2})
    length = graph.op("Squeeze", [shape], "positions.length")
    total = graph.op("Cast", [length], "positions.total", {"to": ir.DataType.INT32})
    cos, sin = _tables(graph, arch, shape)
    return Positions(last, total, cos, sin)


def _tables(graph: Graph, arch: Architecture, length: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return cosine and sine tables [P, D / 2]; ``length`` int64 [1]: tokens so far.

    Longrope stores both tables one below the other and cuts out the rows in use. An If would copy a whole table on
    every run; this copies as many rows as there are tokens.
    """
    rope = arch.rope
    if not rope.switches():
        cos, sin = rope.table()
        return graph.weight("rope.cos", cos.numpy()), graph.weight("rope.sin", sin.numpy())
    short, long = rope.table(), rope.table(long=True)
    original = graph.constant("rope.original", np.array([rope.original], np.int64))
    beyond = graph.op("Greater", [length, original], "rope.beyond")
    flag = graph.op("Cast", [beyond], "rope.flag", {"to": ir.DataType.INT64})
    start = graph.op("Mul", [flag, original], "rope.start")
    end = graph.op("Add", [start, length], "rope.end")
    found = []
    for i, name in enumerate(("cos", "sin")):
        chunks = [short[i].numpy(), long[i].numpy()]
        shape = (len(chunks[0]) + len(chunks[1]), rope.rotary_dim // 2)
        both = graph.stream(f"rope.{name}", ir.DataType.FLOAT, shape, chunks)
        axis = graph.constant("row_axis", np.array([0], np.int64))
        found.append(graph.op("Slice", [both, start, end, axis], f"rope.{name}.Slice"))
    return found[0], found[1]


def attention(linears: Linears, norms: Norms, arch: Architecture, layer: int, x: ir.Value, at: Positions) -> ir.Value:
    """Attention of one layer over ``x`` [B, T, K], with its part of the cache as graph inputs and outputs."""
    graph, prefix = linears.graph, f"model.layers.{layer}."
    cache: list[int | str] = ["batch_size", arch.kv_heads, "past_sequence_length", arch.head_dim]
    past = [graph.input(f"past_key_values.{layer}.{part}", ir.DataType.FLOAT, cache) for part in ("key", "value")]
    packed = linears(x, [prefix + part for part in arch.attention_parts()], prefix + "self_attn.qkv_proj")
    query: list[ir.Value | None] = [packed, None, None]
    if arch.family.qk_norm:
        sizes = np.array([arch.heads, arch.kv_heads, arch.kv_heads], np.int64) * arch.head_dim
        split = graph.constant("qkv_sizes", sizes)
        q, k, v = graph.node("Split", [packed, split], prefix + "self_attn.Split", {"axis": -1}, outputs=3)
        query = [norms.heads(q, prefix + "self_attn.q_norm", arch.head_dim),
                 norms.heads(k, prefix + "self_attn.k_norm", arch.head_dim), v]  # fmt: skip
    mixed, *present = graph.node(
        "GroupQueryAttention",
        [*query, *past, at.last, at.total, at.cos, at.sin],
        prefix + "self_attn.GroupQueryAttention",
        {
            "num_heads": arch.heads,
            "kv_num_heads": arch.kv_heads,
            "scale": 1 / math.sqrt(arch.head_dim),
            "do_rotary": 1,
            "rotary_interleaved": 0,
            "local_window_size": arch.windows[layer],
        },
        outputs=3,
    )
    full: list[int | str] = [*cache[:2], "total_sequence_length", arch.head_dim]
    for value, part in zip(present, ("key", "value"), strict=True):
        graph.output(value, f"present.{layer}.{part}", full)
    return linears(mixed, [prefix + "self_attn.o_proj"], prefix + "self_attn.o_proj")


def gated_mlp(linears: Linears, arch: Architecture, layer: int, x: ir.Value) -> ir.Value:
    """``down(silu(gate(x)) * up(x))``."""
    graph, prefix = linears.graph, f"model.layers.{layer}."
    parts = [prefix + part for part in arch.gate_up()]
    # gate and up stay apart unless the checkpoint packs them: one product is no faster than two
    found = [linears(x, [part], part) for part in parts]
    if len(found) == 1:
        found = graph.node("Split", found, prefix + "mlp.Split", {"axis": -1, "num_outputs": 2}, outputs=2)
    gate, up = found
    silu = graph.op("QuickGelu", [gate], prefix + "mlp.Silu", {"alpha": 1.0})  # x * sigmoid(alpha * x)
    down = prefix + "mlp.down_proj"
    return linears(graph.op("Mul", [silu, up], prefix + "mlp.Mul"), [down], down)
