"""Embeddings and lm_head: stored once where they are tied, and in the precision asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import tiny
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.quant.affine import round_to_nearest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder
from quantized import quantize

BITS = {"int4": 4, "int8": 8}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("embeddings", "head"), [("int8", "int8"), ("int4", "int4"), ("int4", "int8"),
                                                  ("float", "int4"), ("int8", "float")])  # fmt: skip
def test_rounded_tables(embeddings: Any, head: Any, symmetric: bool, tied: bool, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "qwen3", tie_word_embeddings=tied, head_dim=16)
    options = Options(embeddings=embeddings, lm_head=head, group_size=32, symmetric=symmetric, accuracy_level=0)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    assert facts["bits"]["model.embed_tokens"] == BITS.get(embeddings, "float")
    assert facts["bits"]["lm_head"] == BITS.get(head, "float")
    for module, asked in ((model.get_input_embeddings(), embeddings), (model.lm_head, head)):
        weight = module.weight.detach()
        if asked in BITS:
            weight = round_to_nearest(weight, BITS[asked], 32, symmetric=symmetric).dequantize()
        module.weight = torch.nn.Parameter(weight)
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-3


@pytest.mark.parametrize(("table", "size"), [("float", 4.0), ("int8", 1.0), ("int4", 0.5)])
def test_a_tied_table_is_in_the_file_once(table: Any, size: float, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=True)
    options = Options(embeddings=table, lm_head=table)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    tables = set()
    for tensor in model.graph.initializer:
        place = {e.key: int(e.value) for e in tensor.external_data if e.key != "location"}
        if place.get("length") == tiny.VOCAB * 64 * size:
            tables.add(place["offset"])
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("precision", "tied", "head", "embeddings"),
    [("fp32", True, "float", "float"), ("fp32", False, "float", "float"), ("int8", False, 8, 8),
     ("int4", False, 4, 8), ("int4", True, 4, 4)],
)  # fmt: skip
def test_auto_follows_the_layers(
    precision: Any, tied: bool, head: int | str, embeddings: int | str, tmp_path: Path
) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(precision))
    assert facts["bits"]["lm_head"] == head
    assert facts["bits"]["model.embed_tokens"] == embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_auto_is_int8_beside_integers_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    quantize(tmp_path / "hf", tmp_path / "q", "gptq", 4, 32, symmetric=False)
    facts = build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", Options())
    assert facts["bits"]["lm_head"] == facts["bits"]["model.embed_tokens"] == 8


def test_offsets_are_whole_pages_and_the_graph_is_small(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "phi3")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4"))
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert places and all(int(p["offset"]) % 4096 == 0 for p in places)
    assert {p["location"] for p in places} == {"model.onnx.data"}
    assert (tmp_path / "onnx" / "model.onnx").stat().st_size < 40_000
    assert model.ir_version == 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}


def test_tied_in_name_only(tmp_path: Path) -> None:
    """Two tables that differ are two tables, whatever the config says."""
    import json

    model = tiny.checkpoint(tmp_path / "hf", "llama")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-4
