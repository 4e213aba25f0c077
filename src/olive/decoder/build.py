"""Build a folder for ONNX Runtime GenAI from a checkpoint, some rows of one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from olive.decoder import families, genai, kv_cache, lora, peft, tokenizer_files
from olive.decoder.architecture import Architecture
from olive.decoder.attention import attention, positions
from olive.decoder.graph import DATA, MODEL, Graph
from olive.decoder.linear import Linears
from olive.decoder.mlp import mlp
from olive.decoder.norm import Norms
from olive.decoder.options import Options
from olive.decoder.source import Source
from olive.decoder.tables import Tables, scaled
from olive.errors import ConfigError, did_you_mean
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.adapters import BASE, METADATA

Progress = Callable[[str, int, int], None]


def build(
    checkpoint: Checkpoint,
    out: Path,
    options: Options,
    adapters: Sequence[Path] = (),
    base_digest: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer to ``out``; return what was made.

    The graph has inputs for every module that one of ``adapters`` (PEFT folders) adapts.
    """
    arch = _shortened(families.read(checkpoint.config), options)
    source = Source(checkpoint, arch)
    arch = _untie(arch, source)
    modules = _check_tensors(source, arch)
    tokenizer_files.check(checkpoint.folder)
    layout = lora.layout(arch, source)
    adapted = _adapted(arch, adapters, layout)
    out.mkdir(parents=True, exist_ok=True)
    graph = Graph(out, float16=options.float16)
    done: list[str] = []

    def report(module: str) -> None:
        done.append(module)
        if progress:
            progress("layers", len(done), modules)

    linears = Linears(graph, source, options, frozenset(adapted), report)
    _decoder(graph, linears, Norms(graph, source, arch), arch)
    graph.save({BASE: base_digest, METADATA: json.dumps(layout.of(adapted))})
    notes = genai.write(checkpoint, arch, options, out)
    if options.kv_cache == "int8":
        kv_cache.to_int8(out)
    if source.left_out:
        notes.append(f"{len(source.left_out)} tensors that are not the text decoder's were left out, the first "
                     f"{source.left_out[0]}")  # fmt: skip
    return {
        "engine": "olive",
        "family": arch.name,
        "layers": arch.layers,
        "bits": linears.bits,
        "fallbacks": linears.fallbacks,
        "bytes": sum((out / name).stat().st_size for name in (MODEL, DATA)),
        "adapted": sorted(adapted),
        "notes": notes,
    }


def _decoder(graph: Graph, linears: Linears, norms: Norms, arch: Architecture) -> None:
    ids = graph.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    tables, names = Tables(linears, arch), arch.names
    at = positions(graph, ids, matrices=bool(linears.adapted))
    residual = tables.embed(ids)
    if names.positions:
        residual = tables.positions(residual, at.ids())
    residual = at.joined(residual, arch.hidden)
    first = arch.prefix(0) + names.before_attention
    x = norms.plain(residual, first) if names.before_attention else residual

    def added(value: ir.Value, norm: str, prefix: str) -> ir.Value:
        """What attention or MLP adds to the residual: normalized and scaled where the family does so."""
        value = norms.plain(value, prefix + norm) if norm else value
        return scaled(graph, value, arch.residual_scale, f"{value.name}.Scale")

    for layer in range(arch.layers):
        prefix, last = arch.prefix(layer), layer == arch.layers - 1
        following = names.final_norm if last else names.before_attention and (
            arch.prefix(layer + 1) + names.before_attention)  # fmt: skip
        mixed = added(attention(linears, norms, arch, layer, x, at), names.after_attention, prefix)
        if arch.parallel:
            y = norms.plain(residual, prefix + names.before_mlp) if names.before_mlp else x
            thought = graph.op("Add", [mixed, mlp(linears, arch, layer, y)], f"{prefix}Parallel")
        else:
            y, residual = norms.add(mixed, residual, names.before_mlp and prefix + names.before_mlp)
            thought = added(mlp(linears, arch, layer, y), names.after_mlp, prefix)
        x, residual = norms.add(thought, residual, following, last=last)
    x = at.apart(x)
    only_last = linears.options.logits == "last"
    logits = tables.head(at.last_rows(x) if only_last else x)
    shape = ["batch_size", 1 if only_last else "sequence_length", arch.vocab]
    graph.output(logits, "logits", graph.dtype, shape, first=True)


def _shortened(arch: Architecture, options: Options) -> Architecture:
    """Apply a context length that is shorter than what the model was trained for."""
    asked = options.context_length
    if asked is None:
        return arch
    if asked > arch.max_positions:
        raise ConfigError(f"context_length {asked}: the model has {arch.max_positions} positions; give at most that")
    ropes = tuple(rope and replace(rope, rows=asked) for rope in arch.ropes)
    return replace(arch, max_positions=asked, ropes=ropes)


def _untie(arch: Architecture, source: Source) -> Architecture:
    """A config may say tied over two tables that differ; then, as in transformers, they are not."""
    names = arch.names
    if not arch.tied or not all(source.has_module(name) for name in (names.embeddings, names.head)):
        return arch
    if {names.embeddings, names.head} & source.quantized:
        both = [source.checkpoint.weight(f"{name}.weight") for name in (names.embeddings, names.head)]
        return replace(arch, tied=both[0].shape == both[1].shape and bool((both[0] == both[1]).all()))
    if source.shape(names.embeddings) != source.shape(names.head):
        return replace(arch, tied=False)
    pairs = zip(source.slices(names.embeddings), source.slices(names.head), strict=True)
    return replace(arch, tied=all(bool((one() == other()).all()) for one, other in pairs))


def _check_tensors(source: Source, arch: Architecture) -> int:
    """Check that the checkpoint holds what the family needs and nothing that the graph would drop; count linears."""
    names, where, layers = arch.names, source.folder, range(arch.layers)
    ends = [names.embeddings, *([] if arch.tied else [names.head])]
    linears = [arch.prefix(i) + name for i in layers for name in arch.linears(i)]
    norms = [names.final_norm, *(arch.prefix(i) + name for i in layers for name in arch.norms())]
    routers = [arch.prefix(i) + arch.experts.router for i in layers if arch.experts and arch.has_experts(i)]
    tables = [names.positions] if names.positions else []
    needed = [*ends, *linears, *norms, *routers, *tables]
    for module in needed:
        if not source.has_module(module):
            raise ConfigError(f"{where}: tensor {module}.weight is missing for the family {arch.name}")
    for module in ends:
        if source.shape(module) != (arch.vocab, arch.hidden):
            raise ConfigError(f"{where}: tensor {module}.weight is {list(source.shape(module))}, but config.json says "
                              f"{[arch.vocab, arch.hidden]}")  # fmt: skip
    if names.positions and source.shape(names.positions)[0] < arch.first_position + arch.max_positions:
        raise ConfigError(f"{where}: tensor {names.positions}.weight has {source.shape(names.positions)[0]} rows, but "
                          f"the positions in config.json need {arch.first_position + arch.max_positions}")  # fmt: skip
    biased = [arch.prefix(i) + part for i in layers for part in arch.biased]
    for name in [*biased, *(norms if arch.norm == "layer" else [])]:
        if f"{name}.bias" not in source:
            raise ConfigError(f"{where}: tensor {name}.bias is missing for the family {arch.name}")
    allowed = {f"{m}.weight" for m in needed} | {f"{m}.bias" for m in [*linears, names.head]}
    allowed |= {f"{m}.bias" for m in norms if arch.norm == "layer"}
    for name in source.names():
        kept = f"{name}.weight" if name in source.quantized else name
        if kept not in allowed and not (arch.tied and kept == f"{names.head}.weight"):
            what = "quantized module" if name in source.quantized else "tensor"
            raise ConfigError(f"{where}: {what} {name} has no place in the family {arch.name}"
                              f"{did_you_mean(name, allowed) if len(allowed) < 40 else ''}")  # fmt: skip
    rows = sum(source.shape(arch.prefix(0) + part)[0] for part in names.qkv)
    expected = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    if rows != expected:
        raise ConfigError(f"{where}: queries, keys and values have {rows} channels, but the heads in config.json need "
                          f"{expected}")  # fmt: skip
    return len(linears) + len(ends)


def _adapted(arch: Architecture, adapters: Sequence[Path], layout: lora.Layout) -> set[str]:
    found: set[str] = set()
    for folder in adapters:
        for module in sorted(peft.read_peft(folder, layout.layers)):
            if arch.experts and (".experts." in module or module.endswith((arch.experts.router, ".mlp.gate"))):
                raise ConfigError(f"{folder}: adapts {module}: adapters on experts or their router are not supported; "
                                  "train without them as targets, or merge the adapter into its base")  # fmt: skip
            places = layout.places(module)
            if not places:
                raise ConfigError(f"{folder}: adapts {module}, which the base does not have; its layers have "
                                  f"{', '.join(layout.adaptable(arch))}")  # fmt: skip
            found |= set(places)
    return found
