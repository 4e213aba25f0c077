"""Their passes as passes of ours: a table of types, and for each type its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from olive.compat.data import data_set
from olive.compat.notes import Notes, flat
from olive.compat.options import (
    LORA,
    NEEDLESS,
    RENAMED,
    builder,
    excluded,
    lora,
    overrides,
    tables,
)

TYPES = {
    "rtn": "rtn",
    "kquant": "kquant",
    "gptq": "gptq",
    "gptqquantizer": "gptq",
    "gptqmodel": "gptq",
    "autoawqquantizer": "awq",
    "quarot": "rotate",
    "lora": "lora",
    "qlora": "lora",
    "modelbuilder": "decoder",
    "mobiusbuilder": "decoder",
}
"""Their types in small letters, as their files spell them either way, and ours."""
ROUNDED_BY_DECODER = {
    "onnxblockwisertnquantization": "rtn",
    "onnxmatmul4quantizer": "rtn",
    "onnxhqqquantization": "hqq",
    "onnxkquantquantization": "kquant",
}
"""Passes that round the weights of a finished graph, and the algorithm by which our decoder pass rounds them."""
DONE_BY_DECODER = {
    "extractadapters": "the decoder pass makes the adapter inputs of the graph itself",
    "addolivemetadata": "olive.json in the output holds what made it",
}
HINTS = {
    "mergeadapterweights": "the decoder pass keeps an adapter apart, as inputs of the graph",
    "onnxconversion": "for a language model, ModelBuilder and our decoder pass build the graph",
    "orttransformersoptimization": "the decoder pass writes fused operators itself",
    "selectivemixedprecision": "the option target_size of a quantizer chooses bits by layer",
    "spinquant": "rotate has rotations that need no training",
}
QUANTIZERS = ("rtn", "kquant", "gptq", "awq")
LISTS = ("target_modules", "modules_to_not_convert", "overrides")
"""Options that are lists, or may hold some, and not several values to try."""
NO_CHOICE = ("lm_head", "embeds", "zero_point", "precision", "int4_block_size", "int4_is_symmetric",
             "int4_accuracy_level", "int4_algo_config")  # fmt: skip
"""Options that others of ours follow from, so that several values are no choice of one option."""


def convert_passes(data: Mapping[str, Any], named: Mapping[str, Any], notes: Notes) -> list[Any]:
    """Translate the passes in order; those of ``pass_flows`` if the file has them."""
    given = flat_passes(data.get("passes"))
    flows = data.get("pass_flows") or []
    if len(flows) > 1:
        notes.add("pass_flows", "only the first is run; write a workflow file for each other one")
    order = [str(name) for name in flows[0]] if flows else list(given)
    steps: list[Any] = []
    for name in order:
        place = f"passes.{name}"
        if name not in given:
            notes.refuse(place, "named in pass_flows, but not among the passes")
            continue
        alternatives = given[name] if isinstance(given[name], list) else [given[name]]
        found = [_convert(own, place, steps, named, notes) for own in alternatives]
        kept = [step for step in found if step is not None]
        if kept:
            steps.append(kept if len(kept) > 1 else kept[0])
    return steps


def flat_passes(given: Any) -> dict[str, Any]:
    """Return the passes by name; a list of them is named by their places."""
    if isinstance(given, list):
        return {str(i): own for i, own in enumerate(given)}
    return {str(name): own for name, own in given.items()} if isinstance(given, Mapping) else {}


def _convert(given: Any, place: str, steps: list[Any], named: Mapping[str, Any], notes: Notes) -> dict[str, Any] | None:
    """Translate one pass; None if an earlier step takes over what it does, or if it has no counterpart."""
    options = flat(given)
    kind = str(options.pop("type", ""))
    small = kind.lower()
    before = steps[-1] if steps and isinstance(steps[-1], dict) else {}
    graph = before.get("type") == "decoder"
    for name in ("disable_search", "host", "target", "evaluator", "output_name", "clean_run_cache"):
        options.pop(name, None)
    if small == "modelbuilder" and options.get("metadata_only"):
        notes.add(place, "metadata_only: the decoder pass writes genai_config.json itself")
        return None
    if small == "graphsurgeries" and graph and _only_ties(options):
        notes.add(place, "TieWordEmbeddings: the decoder pass writes tied tables once itself")
        return None
    if graph and small in DONE_BY_DECODER:
        notes.add(place, DONE_BY_DECODER[small])
        return None
    if graph and small in ROUNDED_BY_DECODER:
        _round_in_decoder(before, small, options, place, notes)
        return None
    if before.get("type") in QUANTIZERS and TYPES.get(small) in ("rtn", "kquant"):
        _tables_of(before, options, place, notes)
        return None
    if small not in TYPES:
        hint = f": {HINTS[small]}" if small in HINTS else ""
        if small in ROUNDED_BY_DECODER:
            hint = ": it rounds the weights of a finished graph; quantize the checkpoint, or put it after ModelBuilder"
        notes.refuse(place, f"{kind or 'a pass without a type'} has no counterpart{hint}")
        return None
    return _step(TYPES[small], small, options, place, named, notes)


def _only_ties(options: Mapping[str, Any]) -> bool:
    names = {flat(own).get("surgeon") for own in options.get("surgeries") or []}
    return names == {"TieWordEmbeddings"}


def _step(
    ours: str, small: str, options: dict[str, Any], place: str, named: Mapping[str, Any], notes: Notes
) -> dict[str, Any]:
    step: dict[str, Any] = {"type": ours}
    _singles(options, place, notes)
    _data(step, ours, options, place, named, notes)
    special: dict[str, Callable[[dict[str, Any], dict[str, Any], str, Notes], None]] = {
        "decoder": builder,
        "lora": lora,
    }
    if ours in special:
        special[ours](step, options, place, notes)
    elif ours in QUANTIZERS:
        tables(step, options, place, notes)
        overrides(step, options, place, notes)
        excluded(step, options, place, notes)
        if "zero_point" in options:
            step["symmetric"] = not options.pop("zero_point")
    if small == "qlora":
        notes.add(place, "the base is trained on as it is; put a quantizer before it for a quantized base")
    renamed = LORA if ours == "lora" else RENAMED.get(ours, {})
    for name in list(options):
        value = options.pop(name)
        if name in renamed:
            step[renamed[name]] = {"choice": value} if isinstance(value, list) and name != "target_modules" else value
        elif name not in NEEDLESS and value is not None:
            notes.add(f"{place}.{name}", "has no counterpart; left out")
    return step


def _singles(options: dict[str, Any], place: str, notes: Notes) -> None:
    """Take the value out of a list of one; of several values where they are no choice, the first."""
    for name, value in options.items():
        if not isinstance(value, list) or not value or name in LISTS:
            continue
        options[name] = value[0] if len(value) == 1 or name in NO_CHOICE else value
        if len(value) > 1 and name in NO_CHOICE:
            notes.add(f"{place}.{name}", f"only {value[0]} is tried; list alternatives of the pass for the others")


def _data(
    step: dict[str, Any], ours: str, options: dict[str, Any], place: str, named: Mapping[str, Any], notes: Notes
) -> None:
    """Translate what a pass reads."""
    for key in ("data_config", "train_data_config", "calibration_data_config"):
        given = options.pop(key, None)
        if given is None:
            continue
        if ours not in ("awq", "gptq", "kquant", "lora"):
            notes.add(f"{place}.{key}", f"{ours} uses no data")
        elif isinstance(given, str):
            if given in named:
                step["data"] = given
            else:
                notes.add(f"{place}.{key}", f"{given} could not be translated; the shipped text is used")
        else:
            spec = data_set(given, f"{place}.{key}", notes)
            if spec is not None:
                step["data"] = spec


def _tables_of(before: dict[str, Any], options: dict[str, Any], place: str, notes: Notes) -> None:
    """A second quantizer rounds what the first has left float: the output head and the embeddings."""
    own: dict[str, Any] = {}
    tables(own, options, place, notes)
    for name in ("lm_head", "embeddings", "format"):
        if name in own:
            before[name] = own[name]
    if not own:
        notes.add(place, f"all linear layers are quantized by {before['type']} before it; left out")
    else:
        notes.add(place, f"done by {before['type']} before it: lm_head and embeddings are options of it")


def _round_in_decoder(decoder: dict[str, Any], small: str, options: dict[str, Any], place: str, notes: Notes) -> None:
    """Let the decoder pass round the weights while it writes the graph."""
    algorithm = str(options.pop("algorithm", "") or "").lower()
    decoder["precision"] = f"int{options.pop('bits', 4)}"
    decoder["algorithm"] = {"hqq": "hqq", "k_quant": "kquant"}.get(algorithm, ROUNDED_BY_DECODER[small])
    decoder["group_size"] = options.pop("block_size", 32 if small == "onnxkquantquantization" else 128)
    symmetric = options.pop("is_symmetric", ROUNDED_BY_DECODER[small] == "rtn")
    decoder["symmetric"] = bool(symmetric)
    level = options.pop("accuracy_level", None)
    if level in (0, 4):
        decoder["accuracy_level"] = level
    elif level is not None:
        notes.add(f"{place}.accuracy_level", f"{level} has no counterpart; 0 and 4 have")
    for name, value in options.items():
        if name not in NEEDLESS and value not in (None, [], {}):
            notes.add(f"{place}.{name}", "has no counterpart; left out")
