"""Which nodes make a LoRA pair cheapest beside an integer product, one token at a time.

    python benchmarks/lora_forms.py --work FOLDER --forms base fp32 fp16 --rounds 40

The graph is a stack of decoder layers without attention (hidden 2048, inner 8192, packed qkv of 3072; int4 in blocks of
128, random weights), large enough that no weight stays in a processor's cache. Every form adds an adapter of --rank to
all linears; outputs are compared with those of fp32. Sessions differ by some percent for no reason of ours (where their
memory lies), so what an adapter adds is the difference to rank 0 in the same session, in pairs, the forms taking turns
in a changing order.

Shape letters: B batch, T tokens, N out channels, K in channels, R rank.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir
import onnxruntime

from olive.decoder.graph import MICROSOFT, Graph

BLOCK = 128
MICROSOFT |= {"DynamicQuantizeMatMul"}
KINDS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8,
         "uint8": ir.DataType.UINT8}  # fmt: skip


@dataclass
class Stack:
    """A graph in the making and the adapter's tensors that it will be fed with."""

    graph: Graph
    layers: int
    hidden: int
    rank: int
    feeds: dict[str, np.ndarray] = field(default_factory=dict)

    def product(self, x: ir.Value, n: int, k: int, name: str) -> ir.Value:
        """Multiply by integers, other ones in each layer: ONNX Runtime keeps equal weights once."""
        n_, k_ = (
            (n, k) if self.rank else (1, BLOCK)
        )  # without an adapter only the feeds count, and nobody runs the graph
        rng = np.random.default_rng(crc32(name.encode()))
        codes = rng.integers(0, 256, (n_, k_ // BLOCK, BLOCK // 2), np.uint8)
        scales = np.full((n_, k_ // BLOCK), 0.2 / k**0.5, np.float32)
        weights = [self.graph.weight(f"{name}.{which}", array) for which, array in (("q", codes), ("s", scales))]
        attributes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.graph.op("MatMulNBits", [x, *weights], f"{name}.MatMulNBits", attributes)

    def feed(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an input without a default."""
        self.feeds[name] = array
        return self.graph.input(name, KINDS[array.dtype.name], [f"{name}.{i}" for i in range(array.ndim)])  # free

    def pair(self, name: str, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return A [K, R] and B [R, N], the same in every form."""
        rng = np.random.default_rng(crc32(name.encode()))
        a = rng.standard_normal((k, self.rank), np.float32) / np.float32(k**0.5)
        return a, rng.standard_normal((self.rank, n), np.float32) * np.float32(0.3 / max(1, self.rank) ** 0.5)


Form = Callable[[Stack, ir.Value, ir.Value, str, int, Sequence[int]], ir.Value]
"""Adds to ``y`` what adapters make of ``x``; the last argument has N of each part."""


def diagonal(stack: Stack, name: str, k: int, parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay out the pairs of packed parts as one."""
    pairs = [stack.pair(f"{name}.{i}", k, n) for i, n in enumerate(parts)]
    b = np.zeros((stack.rank * len(parts), sum(parts)), np.float32)
    for i, (_, own) in enumerate(pairs):
        b[i * stack.rank : (i + 1) * stack.rank, sum(parts[:i]) : sum(parts[: i + 1])] = own
    return np.concatenate([a for a, _ in pairs], axis=1), b


def _added(stack: Stack, x: ir.Value, y: ir.Value, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
    low = stack.graph.op("MatMul", [x, a], f"{name}.low")
    return stack.graph.op("Add", [y, stack.graph.op("MatMul", [low, b], f"{name}.high")], f"{name}.sum")


def base(_stack: Stack, _x: ir.Value, y: ir.Value, _name: str, _k: int, _parts: Sequence[int]) -> ir.Value:
    """No adapter."""
    return y


def fp32(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """MatMul, MatMul, Add; packed parts as one pair with zeros in B."""
    a, b = diagonal(stack, name, k, parts)
    return _added(stack, x, y, stack.feed(f"{name}.A", a), stack.feed(f"{name}.B", b), name)


def fp32_split(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """Packed parts: one product with A, then one with each B."""
    if len(parts) == 1:
        return fp32(stack, x, y, name, k, parts)
    graph = stack.graph
    pairs = [stack.pair(f"{name}.{i}", k, n) for i, n in enumerate(parts)]
    a = stack.feed(f"{name}.A", np.concatenate([a for a, _ in pairs], axis=1))
    low = graph.op("MatMul", [x, a], f"{name}.low")
    lows = graph.node("Split", [low], f"{name}.lows", {"axis": -1, "num_outputs": len(parts)}, len(parts))
    highs = [graph.op("MatMul", [own, stack.feed(f"{name}.{i}.B", pair[1])], f"{name}.{i}.high")
             for i, (own, pair) in enumerate(zip(lows, pairs, strict=True))]  # fmt: skip
    return graph.op("Add", [y, graph.op("Concat", highs, f"{name}.highs", {"axis": -1})], f"{name}.sum")


def fp32_apart(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """Packed parts: a pair each."""
    if len(parts) == 1:
        return fp32(stack, x, y, name, k, parts)
    graph, highs = stack.graph, []
    for i, n in enumerate(parts):
        a, b = (stack.feed(f"{name}.{i}.{'AB'[j]}", t) for j, t in enumerate(stack.pair(f"{name}.{i}", k, n)))
        highs.append(graph.op("MatMul", [graph.op("MatMul", [x, a], f"{name}.{i}.low"), b], f"{name}.{i}.high"))
    return graph.op("Add", [y, graph.op("Concat", highs, f"{name}.highs", {"axis": -1})], f"{name}.sum")


def fp16(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """float16 inputs and a Cast each."""
    found = []
    for which, tensor in zip("AB", diagonal(stack, name, k, parts), strict=True):
        value = stack.feed(f"{name}.{which}", tensor.astype(np.float16))
        found.append(stack.graph.op("Cast", [value], f"{name}.{which}.Cast", {"to": ir.DataType.FLOAT}))
    return _added(stack, x, y, found[0], found[1], name)


def _integers(tensor: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(np.abs(tensor).max(axis=axis, keepdims=axis is not None, initial=0), 1e-9) / 127
    return np.round(tensor / scale).astype(np.int8), np.array(scale, np.float32)


def int8_cast(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """int8 inputs and a Cast each; the scales of both, one a rank, multiply what is between them."""
    graph, (a, b) = stack.graph, diagonal(stack, name, k, parts)
    (a_codes, a_scale), (b_codes, b_scale) = _integers(a, 0), _integers(b, 1)
    a_value, b_value = (
        graph.op("Cast", [stack.feed(f"{name}.{which}", codes)], f"{name}.{which}.Cast", {"to": ir.DataType.FLOAT})
        for which, codes in (("A", a_codes), ("B", b_codes))
    )
    low = graph.op("MatMul", [x, a_value], f"{name}.low")
    scale = stack.feed(f"{name}.scale", (a_scale.ravel() * b_scale.ravel()))
    low = graph.op("Mul", [low, scale], f"{name}.scaled")
    return graph.op("Add", [y, graph.op("MatMul", [low, b_value], f"{name}.high")], f"{name}.sum")


def int8_dynamic(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """int8 inputs; x and what is between are rounded to int8 on the way. With rank 0, ONNX Runtime 1.32 leaves the
    result unwritten: only good for timing."""
    value, scales = x, []
    for which, tensor in zip("AB", diagonal(stack, name, k, parts), strict=True):
        codes, scale = _integers(tensor, None)
        scales = [stack.feed(f"{name}.{which}", codes), stack.feed(f"{name}.{which}.scale", scale)]
        value = stack.graph.op("DynamicQuantizeMatMul", [value, *scales], f"{name}.{which}.product")
    return stack.graph.op("Add", [y, value], f"{name}.sum")


def gemm(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """The second product adds to y itself: no Add, but Flatten and Reshape, as Gemm takes matrices only."""
    graph, (a, b) = stack.graph, diagonal(stack, name, k, parts)
    n = sum(parts)
    low = graph.op("MatMul", [x, stack.feed(f"{name}.A", a)], f"{name}.low")
    flat = [graph.op("Flatten", [value], f"{name}.flat{i}", {"axis": 2}) for i, value in enumerate((low, y))]
    both = graph.op("Gemm", [flat[0], stack.feed(f"{name}.B", b), flat[1]], f"{name}.high")
    return graph.op("Reshape", [both, graph.constant(f"back_to_{n}", np.array([1, -1, n]))], f"{name}.sum")


def transposed(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """A as PEFT has it, [R, K]."""
    graph, (a, b) = stack.graph, diagonal(stack, name, k, parts)
    value = stack.feed(f"{name}.A", np.ascontiguousarray(a.T))
    low = graph.op("FusedMatMul", [x, value], f"{name}.low", {"transB": 1})
    high = graph.op("MatMul", [low, stack.feed(f"{name}.B", b)], f"{name}.high")
    return graph.op("Add", [y, high], f"{name}.sum")


def transposed_apart(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """As transposed, packed parts with a pair each."""
    if len(parts) == 1:
        return transposed(stack, x, y, name, k, parts)
    graph, highs = stack.graph, []
    for i, n in enumerate(parts):
        a, b = stack.pair(f"{name}.{i}", k, n)
        value = stack.feed(f"{name}.{i}.A", np.ascontiguousarray(a.T))
        low = graph.op("FusedMatMul", [x, value], f"{name}.{i}.low", {"transB": 1})
        highs.append(graph.op("MatMul", [low, stack.feed(f"{name}.{i}.B", b)], f"{name}.{i}.high"))
    return graph.op("Add", [y, graph.op("Concat", highs, f"{name}.highs", {"axis": -1})], f"{name}.sum")


def halves(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """A in two halves along K, one a thread: [2, K / 2, R]; a sum between the products."""
    graph, (a, b) = stack.graph, diagonal(stack, name, k, parts)
    value = stack.feed(f"{name}.A", a.reshape(2, k // 2, a.shape[1]))
    shape = graph.constant(f"halves_of_{k}", np.array([1, 2, 1, k // 2]))
    lows = graph.op("MatMul", [graph.op("Reshape", [x, shape], f"{name}.halves"), value], f"{name}.lows")
    axis = graph.constant("first", np.array([1]))
    low = graph.op("ReduceSum", [lows, axis], f"{name}.low", {"keepdims": 0})
    high = graph.op("MatMul", [low, stack.feed(f"{name}.B", b)], f"{name}.high")
    return graph.op("Add", [y, high], f"{name}.sum")


def _blocks(stack: Stack, x: ir.Value, tensor: np.ndarray, name: str, *, given: bool) -> ir.Value:
    """Multiply by a weight [K, N] rounded to int4 in blocks; one that is ``given`` cannot be packed in advance."""
    k, n = tensor.shape
    size = 32
    grouped = np.pad(tensor.T, ((0, 0), (0, -k % size))).reshape(n, -1, size)
    scale = (np.maximum(np.abs(grouped).max(-1), 1e-9) / 7).astype(np.float32)
    codes = (np.round(grouped / scale[..., None]) + 8).astype(np.uint8)
    add = stack.feed if given else stack.graph.weight
    values = [add(f"{name}.codes", codes[..., ::2] | codes[..., 1::2] << 4), add(f"{name}.scale", scale)]
    attributes = {"K": k, "N": n, "bits": 4, "block_size": size, "accuracy_level": 4}
    return stack.graph.op("MatMulNBits", [x, *values], f"{name}.MatMulNBits", attributes)


def int4(
    stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int], *, given: bool = True
) -> ir.Value:
    """Two MatMulNBits whose weights are inputs; the rank is fixed by their attributes."""
    a, b = diagonal(stack, name, k, parts)
    low = _blocks(stack, x, a, f"{name}.A", given=given)
    return stack.graph.op("Add", [y, _blocks(stack, low, b, f"{name}.B", given=given)], f"{name}.sum")


def builder(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """As GenAI's builder and what follows it: queries, keys and values apart, the pair as integers given as inputs."""
    return int4(stack, x, y, name, k, parts)


def builder_packed(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """As builder, with one adapter for good: initializers, which ONNX Runtime packs on loading."""
    return int4(stack, x, y, name, k, parts, given=False)


def builder_fp32(stack: Stack, x: ir.Value, y: ir.Value, name: str, k: int, parts: Sequence[int]) -> ir.Value:
    """As builder, with the pair in float32."""
    return fp32(stack, x, y, name, k, parts)


def builder_base(_stack: Stack, _x: ir.Value, y: ir.Value, _name: str, _k: int, _parts: Sequence[int]) -> ir.Value:
    """As builder, no adapter."""
    return y


APART = (builder, builder_packed, builder_fp32, builder_base)
FIXED = ("int4", "builder", "builder_packed")
"""Forms that have their rank in attributes."""
FORMS: dict[str, Form] = {form.__name__: form for form in (
    base, fp32, fp32_split, fp32_apart, fp16, int8_cast, int8_dynamic, gemm, transposed, transposed_apart, halves, int4,
    *APART)}  # fmt: skip


def decoder(stack: Stack, form: Form) -> None:
    """Build the layers in the shapes of Llama 3.2 1B: a quarter of the heads for keys and values, 4 x inner."""
    graph, hidden = stack.graph, stack.hidden

    def linear(x: ir.Value, name: str, k: int, *parts: int) -> ir.Value:
        return form(stack, x, stack.product(x, sum(parts), k, name), name, k, parts)

    x = residual = graph.input("x", ir.DataType.FLOAT, [1, "tokens", hidden])
    norm = graph.weight("norm", np.ones(hidden, np.float32))
    qkv = (hidden, hidden // 4, hidden // 4)
    sizes = graph.constant("sizes", np.array(qkv))

    def skip(y: ir.Value, residual: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        found = graph.node("SkipSimplifiedLayerNormalization", [y, residual, norm], name, {"epsilon": 1e-5}, 4)
        found[1].name = found[2].name = ""
        return found[0], found[3]

    for i in range(stack.layers):
        if form in APART:
            q, *others = (linear(x, f"{i}.{part}", hidden, n) for part, n in zip("qkv", qkv, strict=True))
            for part, value in zip("kv", others, strict=True):  # attention's; nobody else reads them
                graph.output(value, f"{i}.{part}.out", ir.DataType.FLOAT, [1, "tokens", qkv[1]])
        else:
            q, *_ = graph.node("Split", [linear(x, f"{i}.qkv", hidden, *qkv), sizes], f"{i}.split", {"axis": -1}, 3)
        y, residual = skip(linear(q, f"{i}.o", hidden, hidden), residual, f"{i}.norm1")
        gate, up = (linear(y, f"{i}.{part}", hidden, 4 * hidden) for part in ("gate", "up"))
        inner = graph.op("Mul", [graph.op("QuickGelu", [gate], f"{i}.act", {"alpha": 1.0}), up], f"{i}.inner")
        x, residual = skip(linear(inner, f"{i}.down", 4 * hidden, hidden), residual, f"{i}.norm2")
    graph.output(x, "y", ir.DataType.FLOAT, [1, "tokens", hidden], first=True)


@dataclass
class Case:
    """A form in a session of its own, with an adapter and with one of rank 0."""

    name: str
    session: Any
    bindings: list[Any]
    """With the adapter, without it."""
    keep: list[Any]
    """What the bindings refer to."""
    megabytes: float
    nodes: int
    seconds: list[list[float]] = field(default_factory=lambda: [[], []])

    def run(self, which: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take the time of one token."""
        started = clock()
        self.session.run_with_iobinding(self.bindings[which])
        self.seconds[which].append(clock() - started)

    def output(self) -> np.ndarray:
        """Return what the last run with the adapter gave."""
        found: np.ndarray = self.bindings[0].copy_outputs_to_cpu()[0]
        return found


def case(name: str, folder: Path, args: argparse.Namespace) -> Case:
    """Build a form; ``NAME`` or ``NAME=RANK``."""
    form, _, rank = name.partition("=")
    folder.mkdir(parents=True, exist_ok=True)
    stacks = []
    for size in (int(rank or args.rank), 0):
        if size == 0 and form in FIXED:
            continue
        stack = Stack(Graph(folder), args.layers, args.hidden, size)
        decoder(stack, FORMS[form])
        stacks.append(stack)
        if size:
            stack.graph.save({})
            settings = onnxruntime.SessionOptions()
            settings.use_per_session_threads = False  # idle pools would spin beside the one that is timed
            settings.log_severity_level = 3
            path, providers = str(folder / "model.onnx"), ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(path, settings, providers=providers)
    x = np.random.default_rng(0).standard_normal((1, args.tokens, args.hidden), np.float32)
    bindings, keep = [], []
    for stack in stacks:
        bindings.append(session.io_binding())
        for key, value in (stack.feeds | {"x": x}).items():
            keep.append(onnxruntime.OrtValue.ortvalue_from_numpy(value))
            bindings[-1].bind_ortvalue_input(key, keep[-1])
        for output in session.get_outputs():
            bindings[-1].bind_output(output.name)
        session.run_with_iobinding(bindings[-1])
    for file in folder.iterdir():
        file.unlink()
    given = sum(value.nbytes for value in stacks[0].feeds.values())
    return Case(name, session, bindings, keep, given / 1e6, len(stacks[0].graph._nodes))


def main() -> None:
    """Build the forms, run them in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help=", ".join(FORMS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0, help="stop after this time")
    args = parser.parse_args()
    onnxruntime.set_global_thread_pool_sizes(args.threads, 1)
    cases = [case(name, args.work / str(i), args) for i, name in enumerate(args.forms)]
    exact = next((c.output() for c in cases if c.name == "fp32"), None)
    # one thread: its own time, in which a busy machine disturbs less
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    began, rounds = time.monotonic(), 0
    while rounds < args.rounds and time.monotonic() - began < args.seconds:
        for one in random.Random(rounds).sample(cases, len(cases)):
            turns = [0, 1] if len(one.bindings) == 2 else [0]
            one.session.run_with_iobinding(one.bindings[0])  # to warm up
            for which in (*turns, *reversed(turns)) if rounds % 2 else (*reversed(turns), *turns):
                one.run(which, clock)
        rounds += 1
    floor = statistics.median(c for one in cases for c in one.seconds[1])
    print(f"\n{rounds} rounds, rank {args.rank}, {args.layers} layers of {args.hidden}, {args.tokens} tokens, "
          f"{args.threads} threads, {'processor time, ' if args.threads == 1 else ''}{time.strftime('%Y-%m-%d')}; "
          f"no adapter active, all forms: median {floor * 1e3:.2f} ms\n")  # fmt: skip
    print("| form | nodes | MB | ms without (best) | ms with (best) | adds, paired [quartiles] | off fp32 |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for one in cases:
        on, off = one.seconds
        ratios = [a / b - 1 for a, b in zip(on, off, strict=True)] if off else [0.0, 0.0]
        quarters = statistics.quantiles(ratios, n=4)
        away = "" if exact is None else f"{np.abs(one.output() - exact).max():.4f}"
        times = [f"{statistics.median(t) * 1e3:.2f} ({min(t) * 1e3:.2f})" if t else "-" for t in (off, on)]
        print(f"| {one.name} | {one.nodes} | {one.megabytes:.1f} | {times[0]} | {times[1]} | {quarters[1]:.1%} "
              f"[{quarters[0]:.1%} to {quarters[2]:.1%}] | {away} |")  # fmt: skip


if __name__ == "__main__":
    main()
