"""The checks that every produced model must pass before it replaces what was there.

``files`` looks at what was written: bits found against bits asked for, graph, configuration. ``full`` also reloads the
model in the runtime that will use it, generates with it, and compares it with its source on a short text.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olive.errors import VerifyError
from olive.model import Model

log = logging.getLogger("olive")

WINDOWS = 4
WINDOW_TOKENS = 256
GENERATED_TOKENS = 8
DEFAULT_MAX_KL = 0.5
"""Nats per token. Working 4-bit models stay under 0.1 on text; broken ones (a wrong zero point, swapped heads) are
above 1."""


def check_files(model: Model, bits: Mapping[str, Any]) -> dict[str, Any]:
    """Check the files of a model; ``bits`` is what each linear should have (a number, or ``float``)."""
    found = _onnx_bits(model.path) if model.kind == "onnx" else _checkpoint_bits(model.path)
    for module, asked in bits.items():
        # one node may hold queries, keys and values, or all experts of a layer
        packed = re.sub(r"(\.experts)\.\d+\..+$", r"\1", re.sub(r"\.[qkv]_proj$", ".qkv_proj", module))
        real = found.get(module, found.get(packed, "float"))
        if real != asked:
            raise VerifyError(f"{module}: asked for {asked} bits, found {real} in the files")
    counts: dict[str, int] = {}
    for value in found.values():
        counts[str(value)] = counts.get(str(value), 0) + 1
    return {"layers_by_bits": counts}


def _checkpoint_bits(folder: Path) -> dict[str, int]:
    from olive.quant.formats.checkpoint import Checkpoint
    from olive.quant.formats.writer import realised_bits

    checkpoint = Checkpoint(folder)
    return realised_bits(checkpoint) if checkpoint.method else {}


def _onnx_bits(folder: Path) -> dict[str, int]:
    """Check the graph; return the bits of every quantized product or table by its module."""
    import onnx

    path = folder / "model.onnx"
    try:
        model = onnx.load(path, load_external_data=False)
        if model.producer_name == "olive":  # other builders use operators that ONNX Runtime has and ONNX has not
            onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise VerifyError(f"{path}: not a valid ONNX graph: {error}") from None
    graph = model.graph
    _check_genai(folder, {value.name for value in graph.input})
    found = {}
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", "QMoE"):
            bits = next(a.i for a in node.attribute if a.name in ("bits", "expert_weight_bits"))
            ours = model.producer_name == "olive"  # then nodes are named after their modules
            found[node.name.rpartition(".")[0] if ours else node.name] = bits
    return found


def _check_genai(folder: Path, inputs: set[str]) -> None:
    from olive.decoder.tokenizer import load

    path = folder / "genai_config.json"
    if not path.is_file():
        return
    decoder = json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]
    names = decoder["inputs"]
    needed = {names["input_ids"], names["attention_mask"]}
    for i in range(decoder["num_hidden_layers"]):
        needed |= {names["past_key_names"] % i, names["past_value_names"] % i}
    if missing := sorted(needed - inputs):
        raise VerifyError(f"{path}: names an input {missing[0]} that the graph does not have")
    load(folder)


def check_tokenizer(model: Model, source: Model, *, strict: bool) -> dict[str, Any]:
    """Compare how GenAI reads text with tokenizer.json and with transformers; ``strict``: raise :class:`VerifyError` if
    ordinary text, or a conversation in the chat template, is read otherwise than the file says."""
    from olive.decoder.tokenizer import compare
    from olive.runtime.torch_model import load_tokenizer

    found = compare(load_tokenizer(source.path, source.trust_remote_code), model.path)
    if strict and found.differences:
        raise VerifyError(
            f"{model.name}: tokenizer.json: {found.differences[0]}; the model would get other tokens than it was "
            "trained on; --verify_tokenizer any accepts that, if the program that runs the model reads text itself"
        )
    for note in (*found.differences, *found.notes):
        log.warning("tokenizer: %s", note)
    return {"reads_as_its_file": not found.differences, "notes": found.differences + found.notes}


def check_quality(
    model: Model,
    source: Model,
    *,
    reference: Model | None,
    bits: Mapping[str, Any],
    max_kl: float | None,
    device: str,
    provider: str,
) -> dict[str, Any]:
    """Reload, generate and compare with the source; with adapters also against ``reference``, the model that has them
    in PEFT form. Raises :class:`VerifyError` above ``max_kl``. A graph for a ``provider`` that is not here is compared
    as the CPU computes it, and does not generate."""
    from olive.data.rows import heldout_text
    from olive.data.samples import text_windows
    from olive.quant.formats.checkpoint import longest, read_config
    from olive.runtime.torch_model import load_tokenizer

    tokenizer = load_tokenizer(source.path, source.trust_remote_code)
    length = min(WINDOW_TOKENS, longest(read_config(source.path)))
    ids = text_windows(heldout_text(), tokenizer, length, WINDOWS)
    lowest = min((b for b in bits.values() if isinstance(b, int)), default=16)
    limit = max_kl if max_kl is not None else DEFAULT_MAX_KL if lowest >= 4 else math.inf
    generated = (
        _generates(model, tokenizer) if _is_here(provider) else f"not run: {provider} is not in this onnxruntime"
    )
    if not generated:
        raise VerifyError(f"{model.name}: generates nothing")
    figures = {"generates": generated, **_compare(source, None, model, None, ids, device, limit)}
    if model.kind == "onnx" and reference is not None:
        for name, file in model.adapters.items():
            with_adapter = _compare(reference, reference.adapters[name], model, file, ids, device, limit)
            figures[f"adapter {name}"] = with_adapter
    return figures


def _is_here(provider: str) -> bool:
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


def _generates(model: Model, tokenizer: Any) -> int:
    """Return how many tokens the reloaded model generates."""
    prompt = "The"
    if model.kind == "onnx":
        from olive.runtime.genai import Generator

        with Generator(model.path) as generator:
            return len(generator.generate(prompt, max_new_tokens=GENERATED_TOKENS).tokens)
    from olive.runtime.torch_model import load

    loaded = load(model.path, trust_remote_code=model.trust_remote_code)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = loaded.generate(ids, max_new_tokens=GENERATED_TOKENS, do_sample=False)
    return int(out.shape[1] - ids.shape[1])


def _compare(
    source: Model, source_adapter: Path | None, model: Model, adapter: Path | None, ids: Any, device: str, limit: float
) -> dict[str, Any]:
    import torch

    from olive.evaluate.quality import Quality

    quality = Quality()
    expected = _hf_logits(source, source_adapter, ids, device)
    found = _hf_logits(model, None, ids, device) if model.kind == "hf" else _onnx_logits(model, adapter, ids)
    for row, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not torch.isfinite(got).all():
            raise VerifyError(f"{model.name}: gives logits that are not finite numbers")
        quality.add(want.cpu(), got.cpu(), ids[row : row + 1])
    figures = quality.figures()
    if not figures["kl_divergence"] <= limit:
        raise VerifyError(
            f"KL divergence from the source is {figures['kl_divergence']:.4f} nats per token, above {limit:g} "
            f"(top-1 agreement {figures['top1_agreement']:.1%}); a smaller group size, more bits or calibration data "
            "help; --max_kl sets the limit"
        )
    return figures


def _hf_logits(model: Model, adapter: Path | None, ids: Any, device: str) -> Iterator[Any]:
    from olive.decoder.merge import Merged
    from olive.evaluate.logits import checkpoint_logits

    if adapter is None:
        return checkpoint_logits(model, ids, device)
    return checkpoint_logits(model, ids, device, lambda tensors: Merged(tensors, adapter))


def _onnx_logits(model: Model, adapter: Path | None, ids: Any) -> Iterator[Any]:
    import torch

    from olive.runtime.session import OnnxDecoder

    decoder = OnnxDecoder(model.path)
    for row in ids:
        yield torch.from_numpy(decoder.logits(row[None].numpy(), adapter))
