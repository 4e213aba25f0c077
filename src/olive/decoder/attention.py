"""Positions and attention with a cache.

Shape letters: B batch, T tokens, H heads, D head size, K channels, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from olive.decoder.architecture import Architecture
from olive.decoder.graph import Graph
from olive.decoder.linear import Linears
from olive.decoder.norm import Norms
from olive.decoder.rope import Rope

CACHE_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


@dataclass
class Positions:
    """What attention must know of the positions, the same for every layer."""

    graph: Graph
    mask: ir.Value
    """int64 [B, P]: 1 for each token of a row, then 0; padding must be on the right."""
    tokens: ir.Value
    """int64 [B, T]: the token ids of this run."""
    last: ir.Value
    """int32 [B, 1]: position of the last token of each row."""
    total: ir.Value
    """int32 scalar: tokens so far, with those of this run."""
    length: ir.Value
    """int64 [1]: the same."""
    matrices: bool = False
    """Activations are [B * T, K] but in attention, for operators that take nothing else; else [B, T, K]."""
    _tables: dict[int, tuple[Rope, ir.Value, ir.Value]] = field(default_factory=dict)
    _ids: ir.Value | None = None
    _run: ir.Value | None = None
    _shape: ir.Value | None = None

    def joined(self, x: ir.Value, k: int) -> ir.Value:
        """Bring [B, T, K] to the form outside attention."""
        if not self.matrices:
            return x
        shape = self.graph.constant(f"rows_of_{k}", np.array([-1, k], np.int64))
        return self.graph.op("Reshape", [x, shape], f"{x.name}.Joined")  # [B, T, K] -> [B * T, K]

    def apart(self, x: ir.Value) -> ir.Value:
        """Undo :meth:`joined`."""
        if not self.matrices:
            return x
        if self._shape is None:
            sizes = self.graph.op("Shape", [self.tokens], "positions.shape")
            rest = self.graph.constant("rest", np.array([-1], np.int64))
            self._shape = self.graph.op("Concat", [sizes, rest], "positions.apart", {"axis": 0})
        return self.graph.op("Reshape", [x, self._shape], f"{x.name}.Apart")  # [B * T, K] -> [B, T, K]

    def ids(self) -> ir.Value:
        """Return the positions int64 [B, T] of this run's tokens."""
        if self._ids is None:
            graph = self.graph
            axis = graph.constant("sum_axis", np.array(1, np.int64))
            count = graph.op("CumSum", [self.mask, axis], "positions.CumSum")  # [B, P]
            ids = graph.op("Sub", [count, graph.constant("one", np.array(1, np.int64))], "positions.all")
            start = graph.op("Neg", [self._width()], "positions.back")
            end = graph.constant("far", np.array([np.iinfo(np.int64).max], np.int64))
            axes = graph.constant("mask_axis", np.array([1], np.int64))
            self._ids = graph.op("Slice", [ids, start, end, axes], "positions.ids")
        return self._ids

    def _width(self) -> ir.Value:
        """Return the tokens of this run, int64 [1]."""
        if self._run is None:
            self._run = self.graph.op("Shape", [self.tokens], "positions.tokens", {"start": 1, "end": 2})
        return self._run

    def last_rows(self, x: ir.Value) -> ir.Value:
        """Return ``x`` [B, 1, K] of each row's last token of this run, out of [B, T, K]."""
        graph = self.graph
        before = graph.op("Sub", [self.length, self._width()], "last.before")  # tokens of earlier runs
        last = graph.op("Cast", [self.last], "last.position", {"to": ir.DataType.INT64})
        index = graph.op("Sub", [last, before], "last.index")  # [B, 1]
        axis = graph.constant("mask_axis", np.array([1], np.int64))
        where = graph.op("Unsqueeze", [index, axis], "last.where")  # [B, 1, 1]
        return graph.op("GatherND", [x, where], "last.GatherND", {"batch_dims": 1})

    def tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """Return cosine and sine tables [P, D / 2] of a rope; layers with the same rope share them."""
        for known, cos, sin in self._tables.values():
            if known == rope:
                return cos, sin
        suffix = str(len(self._tables) or "")
        cos, sin = _tables(self.graph, rope, self.length, suffix)
        self._tables[len(self._tables)] = rope, cos, sin
        return cos, sin


def positions(graph: Graph, tokens: ir.Value, *, matrices: bool) -> Positions:
    """Add the attention mask input and derive positions from it; ``tokens`` int64 [B, T]."""
    mask = graph.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    axis = graph.constant("mask_axis", np.array([1], np.int64))
    one = graph.constant("one", np.array(1, np.int64))
    seen = graph.op("ReduceSum", [mask, axis], "positions.Sum", {"keepdims": 1})
    before = graph.op("Sub", [seen, one], "positions.Sub")
    last = graph.op("Cast", [before], "positions.last", {"to": ir.DataType.INT32})
    shape = graph.op("Shape", [mask], "positions.Shape", {"start": 1, "end": 2})
    length = graph.op("Squeeze", [shape], "positions.length")
    total = graph.op("Cast", [length], "positions.total", {"to": ir.DataType.INT32})
    return Positions(graph, mask, tokens, last, total, shape, matrices)


def _tables(graph: Graph, rope: Rope, length: ir.Value, suffix: str) -> tuple[ir.Value, ir.Value]:
    """Write the tables of a rope; ``length`` int64 [1]: tokens so far.

    Longrope stores both tables one below the other and cuts out the rows in use. An If would copy a whole table on
    every run; this copies as many rows as there are tokens.
    """
    name = f"rope{suffix}"
    if not rope.switches():
        cos, sin = rope.table()
        return graph.weight(f"{name}.cos", cos.numpy()), graph.weight(f"{name}.sin", sin.numpy())
    short, long = rope.table(), rope.table(long=True)
    original = graph.constant(f"{name}.original", np.array([rope.original], np.int64))
    beyond = graph.op("Greater", [length, original], f"{name}.beyond")
    flag = graph.op("Cast", [beyond], f"{name}.flag", {"to": ir.DataType.INT64})
    start = graph.op("Mul", [flag, original], f"{name}.start")
    end = graph.op("Add", [start, length], f"{name}.end")
    found = []
    for i, part in enumerate(("cos", "sin")):
        chunks = [table[i].numpy().astype(graph.dtype.numpy()) for table in (short, long)]
        shape = (len(chunks[0]) + len(chunks[1]), rope.rotary_dim // 2)
        both = graph.stream(f"{name}.{part}", graph.dtype, shape, chunks)
        axis = graph.constant("row_axis", np.array([0], np.int64))
        found.append(graph.op("Slice", [both, start, end, axis], f"{name}.{part}.Slice"))
    return found[0], found[1]


def attention(linears: Linears, norms: Norms, arch: Architecture, layer: int, x: ir.Value, at: Positions) -> ir.Value:
    """Attention of one layer over ``x``, in the form of ``at``, with its part of the cache as inputs and outputs."""
    graph, prefix, options = linears.graph, arch.prefix(layer), linears.options
    kept = options.kv_cache if options.kv_cache in ("float32", "float16") else ""
    dtype = CACHE_TYPES[kept] if kept else graph.dtype
    cache: list[int | str] = ["batch_size", arch.kv_heads, "past_sequence_length", arch.head_dim]
    past = [graph.input(f"past_key_values.{layer}.{part}", dtype, cache) for part in ("key", "value")]
    module = prefix + arch.qkv_module()
    packed = at.apart(linears(x, [prefix + part for part in arch.names.qkv], module))
    parent, rope = module.rpartition(".")[0], arch.ropes[layer]
    query: list[ir.Value | None] = [packed, None, None]
    split = bool(arch.names.q_norm) or not options.target.packed_qkv
    if split:
        sizes = np.array([arch.heads, arch.kv_heads, arch.kv_heads], np.int64) * arch.head_dim
        q, k, v = graph.node("Split", [packed, graph.constant("qkv_sizes", sizes)], f"{parent}.Split", {"axis": -1}, 3)
        if arch.names.q_norm:
            q, k = (norms.heads(value, prefix + name) for value, name in
                    ((q, arch.names.q_norm), (k, arch.names.k_norm)))  # fmt: skip
        query = [q, k, v]
    cos, sin = at.tables(rope) if rope else (None, None)
    if rope and not options.target.packed_qkv:  # rotated by an operator of its own
        for i, heads in ((0, arch.heads), (1, arch.kv_heads)):
            attributes = {"interleaved": 0, "num_heads": heads, "rotary_embedding_dim": rope.rotary_dim}
            inputs = [query[i], at.ids(), cos, sin]
            query[i] = graph.op("RotaryEmbedding", inputs, f"{parent}.Rotary{'QK'[i]}", attributes)
        cos = sin = None
    inputs = [*query, *past, at.last, at.total, cos, sin]
    while inputs[-1] is None:
        inputs.pop()
    mixed, *present = graph.node(
        "GroupQueryAttention",
        inputs,
        f"{parent}.GroupQueryAttention",
        {
            "num_heads": arch.heads,
            "kv_num_heads": arch.kv_heads,
            "scale": arch.attention_scale or 1 / math.sqrt(arch.head_dim),
            "do_rotary": int(cos is not None),
            "rotary_interleaved": 0,
            "local_window_size": arch.windows[layer],
            **({"softcap": arch.attention_softcap} if arch.attention_softcap else {}),
        },
        outputs=3,
    )
    full: list[int | str] = [*cache[:2], "total_sequence_length", arch.head_dim]
    for value, part in zip(present, ("key", "value"), strict=True):
        graph.output(value, f"present.{layer}.{part}", dtype, full)
    out = prefix + arch.names.attention_out
    return linears(at.joined(mixed, arch.heads * arch.head_dim), [out], out)
