"""The cache of keys and values in other types, the context length, and prompts read in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer

import tiny
from olive.data.rows import heldout_text
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder

FAMILIES = ("llama", "gemma3_text", "gpt2", "smollm3")


def decoded(folder: Path, ids: np.ndarray, dtype: Any) -> np.ndarray:
    """Feed tokens one by one through the cache, as generation does; return the last logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    cache = {value.name: np.empty((1, value.shape[1], 0, value.shape[3]), dtype) for value in names}
    outputs = [value.name for value in session.get_outputs()]
    logits = np.empty(0)
    for position in range(ids.shape[1]):
        mask = np.ones((1, position + 1), np.int64)
        feed = {"input_ids": ids[:, position : position + 1], "attention_mask": mask} | cache
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
        logits = found["logits"][0, -1]
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    return logits


@pytest.mark.parametrize(("kind", "dtype", "bound"), [("float16", np.float16, 1e-2), ("int8", np.int8, 0.2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_caches_change_little(family: str, kind: Any, dtype: Any, bound: float, tmp_path: Path) -> None:
    """float16 keeps 11 bits of keys and values, int8 7 of each channel's largest, at logits of about 5."""
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(kv_cache=kind))
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    # text of the kind that the scales come from: values of random bytes would be cut off
    tokens = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode(heldout_text()[:40]).ids
    ids = torch.tensor([tokens[:40]])
    with torch.no_grad():
        expected = model(ids).logits[0, -1].numpy()
    found = decoded(tmp_path / "onnx", ids.numpy(), dtype)
    assert 1e-6 < np.abs(found - expected).mean() < bound
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy())[0, -1] - expected).mean() < bound


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_genai_generates_with_each_cache(kind: Any, tmp_path: Path) -> None:
    from olive.runtime.genai import Generator

    tiny.checkpoint(tmp_path / "hf", "llama")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(kv_cache=kind))
    with Generator(tmp_path / "onnx") as generator:
        assert generator.generate(tiny.ids(20, batch=1)[0].tolist(), max_new_tokens=8).tokens


def test_context_length_shortens_tables_and_is_told_to_genai(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(context_length=64))
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 64
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert next(list(t.dims) for t in graph.initializer if t.name == "rope.cos") == [64, 8]
    ids = tiny.ids(64)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-4
    with pytest.raises(ConfigError, match="context_length 512: the model has 256 positions"):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "longer", Options(context_length=512))


def test_a_prompt_read_in_pieces_gives_the_same_tokens(tmp_path: Path) -> None:
    from olive.runtime.genai import Generator

    tiny.checkpoint(tmp_path / "hf", "mistral", sliding_window=16)
    found = []
    for chunk in (7, 64):
        build(Checkpoint(tmp_path / "hf"), tmp_path / str(chunk), Options(chunk_size=chunk))
        config = json.loads((tmp_path / str(chunk) / "genai_config.json").read_text())
        assert config["search"]["chunk_size"] == chunk
        with Generator(tmp_path / str(chunk)) as generator:
            found.append(generator.generate(tiny.ids(60, batch=1)[0].tolist(), max_new_tokens=12).tokens)
    assert found[0] == found[1]


def test_longrope_is_read_in_one_piece(tmp_path: Path) -> None:
    """The pieces before the switch would be cached with the other table."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    tiny.checkpoint(tmp_path / "hf", "phi3", original_max_position_embeddings=64, rope_parameters=rope)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(chunk_size=16))
    assert "chunk_size" not in json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["search"]
    assert any("chunk_size is not used" in note for note in facts["notes"])
