"""The MLP of a decoder layer, gated or not, and mixtures of experts in its place.

Shape letters: B batch, T tokens, K channels, E experts, I inner channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from olive.decoder import weights
from olive.decoder.architecture import Activation, Architecture, Experts
from olive.decoder.graph import Graph
from olive.decoder.linear import Linears, Part
from olive.errors import ConfigError
from olive.quant.affine import concatenate, fitting_group


def mlp(linears: Linears, arch: Architecture, layer: int, x: ir.Value) -> ir.Value:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where nothing is gated."""
    if arch.experts is not None and arch.has_experts(layer):
        return _experts(linears, arch, arch.experts, layer, x)
    graph, prefix = linears.graph, arch.prefix(layer)
    modules = [prefix + part for part in arch.names.gate_up]
    # gate and up stay apart unless the checkpoint packs them: one product is no faster than two
    found = [linears(x, [module], module) for module in modules]
    parent = (prefix + arch.names.down).rpartition(".")[0]
    quick = linears.options.target.quick_gelu
    if not arch.gated:
        inner = _activation(graph, found[0], arch.activation, f"{parent}.Act", quick=quick)
    else:
        if len(found) == 1:
            found = graph.node("Split", found, f"{parent}.Split", {"axis": -1, "num_outputs": 2}, outputs=2)
        gate = _activation(graph, found[0], arch.activation, f"{parent}.Act", quick=quick)
        inner = graph.op("Mul", [gate, found[1]], f"{parent}.Mul")
    down = prefix + arch.names.down
    return linears(inner, [down], down)


def _activation(graph: Graph, x: ir.Value, kind: Activation, name: str, *, quick: bool) -> ir.Value:
    if kind == "relu":
        return graph.op("Relu", [x], name)
    if kind == "silu":
        if quick:
            return graph.op("QuickGelu", [x], name, {"alpha": 1.0})  # x * sigmoid(alpha * x)
        return graph.op("Mul", [x, graph.op("Sigmoid", [x], f"{name}.Sigmoid")], name)
    return graph.op("Gelu", [x], name, {"approximate": "tanh" if kind == "gelu_tanh" else "none"})


def _experts(linears: Linears, arch: Architecture, experts: Experts, layer: int, x: ir.Value) -> ir.Value:
    """Route each token to its experts, all in one operator; gate and up lie in turns, row by row."""
    graph, prefix = linears.graph, arch.prefix(layer)
    if arch.activation != "silu" or not linears.options.target.experts:
        what = f"activation {arch.activation}" if arch.activation != "silu" else linears.options.provider
        raise ConfigError(f"experts are not built for {what}; only silu on CPUExecutionProvider")
    router = prefix + experts.router
    route = graph.stream(f"{router}.weight", graph.dtype, (arch.hidden, experts.count),
                         weights.float_columns([linears.source.weight(router)], graph.dtype.numpy().type))  # fmt: skip
    scores = graph.op("MatMul", [x, route], f"{router}.MatMul")  # [B, T, E]
    flat = graph.constant("flat_experts", np.array([-1, experts.count], np.int64))
    scores = graph.op("Reshape", [scores, flat], f"{router}.Flat")  # [B, T, E] -> [B * T, E]
    names = [[prefix + name.format(i) for i in range(experts.count)] for name in
             (experts.gate, experts.up, experts.down)]  # fmt: skip
    options = linears.options
    channels = math.gcd(*(linears.source.shape(row[0])[1] for row in names))
    size = fitting_group(channels, options.group_size)  # one for all: the operator takes no other
    gates, ups, downs = ([linears.part(m, options.layer_bits, group_size=size) for m in row] for row in names)
    every = (*gates, *ups, *downs)
    name = (prefix + experts.down).partition(".{}")[0]
    attributes = {"k": experts.chosen, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
                  "activation_beta": 0.0, "normalize_routing_weights": int(experts.normalized)}  # fmt: skip
    if any(part.bits is None for part in every) and not any(part.bits and part.held for part in every):
        for part in every:
            if part.bits is not None:
                linears.fall_back(part.module, "another matrix of the layer's experts stays float: kept as float")
        inputs = _float_experts(linears, name, gates, ups, downs)
        y = graph.op("MoE", [x, scores, *inputs], f"{name}.MoE", attributes)
    else:
        y = _integer_experts(linears, name, (gates, ups, downs), attributes, (x, scores))
    for module in (module for row in names for module in row):
        linears.done(module)
    return y


def _float_experts(
    linears: Linears, name: str, gates: list[Part], ups: list[Part], downs: list[Part]
) -> list[ir.Value | None]:
    graph, e, (i, k) = linears.graph, len(gates), (gates[0].n, gates[0].k)
    dtype = graph.dtype.numpy()

    def first() -> Iterator[np.ndarray]:
        for gate, up in zip(gates, ups, strict=True):
            pair = [linears.floats(part).float().numpy() for part in (gate, up)]
            yield np.stack(pair, axis=1).astype(dtype)  # two of [I, K] -> [I, 2, K]

    def second() -> Iterator[np.ndarray]:
        for down in downs:
            yield linears.floats(down).float().numpy().astype(dtype)

    return [graph.stream(f"{name}.gate_up.weight", graph.dtype, (e, 2 * i, k), first()), None,
            graph.stream(f"{name}.down.weight", graph.dtype, (e, k, i), second())]  # fmt: skip


def _integer_experts(
    linears: Linears,
    name: str,
    parts: tuple[list[Part], list[Part], list[Part]],
    attributes: dict[str, Any],
    tokens: tuple[ir.Value, ir.Value],
) -> ir.Value:
    gates, ups, downs = parts
    e, (inner, k) = len(gates), (gates[0].n, gates[0].k)
    kinds = {f"{p.bits} bits by {p.block}" if p.bits else "float" for p in (*gates, *ups, *downs)}
    if len(kinds) > 1:
        raise ConfigError(f"{name}: the experts of a layer must have the same bits and group size, but have "
                          f"{', '.join(sorted(kinds))}; quantize them again, with a group size that divides {k} and "
                          f"{inner} channels; precision and group_size here are for those that are float")  # fmt: skip

    def whole(part: Part) -> weights.QuantizedWeight:
        return concatenate([job() for job in linears.integers(part)])

    first = (lambda g=g, u=u: weights.blocks(weights.interleaved(whole(g), whole(u)))
             for g, u in zip(gates, ups, strict=True))  # fmt: skip
    second = (lambda d=d: weights.blocks(whole(d)) for d in downs)
    values: list[ir.Value | None] = [*tokens]
    zeros: list[ir.Value | None] = []
    for part, jobs, (n, width) in (("gate_up", first, (2 * inner, k)), ("down", second, (k, inner))):
        stored = linears.write(f"{name}.{part}", jobs, (e * n, width), gates[0])
        # rows of all experts [E * N, ...] -> [E, N, ...], over the same bytes
        shapes = ((stored.weight, (e, n, width * stored.bits // 8)), (stored.scales, (e, n, width // stored.block)))
        values += [linears.graph.alias(f"{value.name}.experts", value, shape) for value, shape in shapes]
        values.append(None)  # no bias
        zero = stored.zero_points
        groups = -(-width // stored.block * stored.bits // 8)
        zeros.append(zero and linears.graph.alias(f"{zero.name}.experts", zero, (e, n, groups)))
    values += [None, None, None, *zeros]
    while values[-1] is None:
        values.pop()
    level = linears.options.accuracy_level if gates[0].bits == 4 else 0
    own = {"expert_weight_bits": gates[0].bits, "block_size": gates[0].block, "accuracy_level": level}
    return linears.graph.op("QMoE", values, f"{name}.QMoE", attributes | own)
