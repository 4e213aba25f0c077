"""Build a folder for ONNX Runtime GenAI from a checkpoint, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from olive.decoder import families, genai, lora, peft
from olive.decoder.blocks import attention, gated_mlp, positions
from olive.decoder.families import Architecture
from olive.decoder.graph import DATA, MODEL, Graph
from olive.decoder.linear import Linears
from olive.decoder.norm import Norms
from olive.decoder.options import Options
from olive.decoder.tables import EMBEDDINGS, HEAD, Tables
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
    arch = _untie(families.read(checkpoint.config), checkpoint)
    modules = _check_tensors(checkpoint, arch)
    genai.check(checkpoint.folder)
    packed = lora.packing(arch, checkpoint)
    adapted = _adapted(arch, adapters, packed)
    out.mkdir(parents=True, exist_ok=True)
    graph = Graph(out)
    done: list[str] = []

    def report(module: str) -> None:
        done.append(module)
        if progress:
            progress("layers", len(done), modules)

    linears = Linears(graph, checkpoint, options, frozenset(adapted), report)
    _decoder(graph, linears, Norms(graph, checkpoint, arch.epsilon), arch)
    graph.save({BASE: base_digest, METADATA: json.dumps({"packed": {m: p for m, p in packed.items() if m in adapted}})})
    notes = genai.write(checkpoint, arch, out)
    if arch.rope.switches() and arch.rope.original != genai.REWINDS_BEYOND:
        notes.append(f"longrope switches beyond {arch.rope.original} tokens, but GenAI recomputes its cache only at "
                     f"{genai.REWINDS_BEYOND}: a text that crosses it while generating mixes both")  # fmt: skip
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
    tables = Tables(linears, arch)
    at = positions(graph, arch)
    residual = tables.embed(ids)
    x = norms.plain(residual, "model.layers.0.input_layernorm")
    for layer in range(arch.layers):
        prefix, last = f"model.layers.{layer}.", layer == arch.layers - 1
        mixed = attention(linears, norms, arch, layer, x, at)
        x, residual = norms.add(mixed, residual, f"{prefix}post_attention_layernorm")
        thought = gated_mlp(linears, arch, layer, x)
        following = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
        x, residual = norms.add(thought, residual, following, last=last)
    logits = tables.head(x)
    graph.output(logits, "logits", ["batch_size", "sequence_length", arch.vocab], first=True)


def _untie(arch: Architecture, checkpoint: Checkpoint) -> Architecture:
    """A config may say tied over two tables that differ; then, as in transformers, they are not."""
    names = f"{EMBEDDINGS}.weight", f"{HEAD}.weight"
    if arch.tied and all(name in checkpoint for name in names):
        embeddings, head = (checkpoint.weight(name) for name in names)
        return replace(arch, tied=embeddings.shape == head.shape and bool((embeddings == head).all()))
    return arch


def _check_tensors(checkpoint: Checkpoint, arch: Architecture) -> int:
    """Check that the checkpoint holds what the family needs and nothing that the graph would drop; count linears."""
    layers = [f"model.layers.{i}." for i in range(arch.layers)]
    linears = [prefix + name for prefix in layers for name in arch.linears()]
    norms = [prefix + name for prefix in layers for name in arch.norms()]
    needed = [EMBEDDINGS, "model.norm", *linears, *norms, *([] if arch.tied else [HEAD])]
    where = checkpoint.folder
    for module in needed:
        if f"{module}.weight" not in checkpoint:
            raise ConfigError(f"{where}: tensor {module}.weight is missing for the family {arch.name}")
    for name in (prefix + part for prefix in layers for part in arch.family.biased):
        if f"{name}.bias" not in checkpoint:
            raise ConfigError(f"{where}: tensor {name}.bias is missing for the family {arch.name}")
    allowed = {f"{m}.weight" for m in needed} | {f"{m}.bias" for m in [*linears, *([] if arch.tied else [HEAD])]}
    for name in checkpoint.float_names:
        tied_copy = arch.tied and name == f"{HEAD}.weight"
        if name not in allowed and not tied_copy and not name.endswith("rotary_emb.inv_freq"):
            raise ConfigError(f"{where}: tensor {name} has no place in the family {arch.name}"
                              f"{did_you_mean(name, allowed) if len(allowed) < 40 else ''}")  # fmt: skip
    for module in checkpoint.quantized:
        if f"{module}.weight" not in allowed and not (arch.tied and module == HEAD):
            raise ConfigError(f"{where}: quantized module {module} has no place in the family {arch.name}")
    _check_shapes(checkpoint, arch)
    return len(linears) + (1 if arch.tied else 2)


def _check_shapes(checkpoint: Checkpoint, arch: Architecture) -> None:
    """Check that what config.json says of heads fits the weights."""
    prefix = "model.layers.0."
    rows = sum(checkpoint.linear_shape(prefix + part)[0] for part in arch.attention_parts())
    expected = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    if rows != expected:
        raise ConfigError(f"{checkpoint.folder}: queries, keys and values have {rows} channels, but the heads in "
                          f"config.json need {expected}")  # fmt: skip


def _adapted(arch: Architecture, adapters: Sequence[Path], packed: lora.Packed) -> set[str]:
    known = {f"model.layers.{i}.{name}" for i in range(arch.layers) for name in arch.linears()}
    for folder in adapters:
        for module in sorted(peft.targets([folder]) - known):
            raise ConfigError(f"{folder}: adapts {module}, which the base does not have; its layers have "
                              f"{', '.join(arch.linears())}")  # fmt: skip
    return lora.graph_modules(peft.targets(adapters), packed)
