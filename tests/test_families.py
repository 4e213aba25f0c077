"""Architectures beyond our own builder: quantizers need no table of names, and GenAI's builder is the fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from olive.cli import main
from olive.evaluate.logits import checkpoint_logits
from olive.model import Model, read_manifest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.torch_model import load

pytestmark = pytest.mark.usefixtures("cache")

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "granite": {},
    "olmo2": {},
}
LINEARS = {"gemma2": 14, "gpt_neox": 8, "opt": 12, "granite": 14, "olmo2": 14}


@pytest.mark.parametrize("algorithm", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_architecture_with_linear_layers_is_quantized(family: str, algorithm: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", family, **FAMILIES[family])
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it rests a while. " * 60)
    data = ["-d", "text", "--data_files", str(text)] if algorithm != "rtn" else []
    argv = ["quantize", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "q"), "--algorithm", algorithm, *data]
    assert main([*argv, "--group_size", "32", "--max_kl", "0.4"]) == 0
    assert len(Checkpoint(tmp_path / "q").quantized) == LINEARS[family]
    manifest = read_manifest(tmp_path / "q")
    assert manifest is not None
    assert manifest["verification"]["generates"] > 0
    assert main(["dequantize", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "f"), "--max_kl", "1e-5"]) == 0


def test_gpt2_whose_layers_hold_no_linear_modules_is_built_and_not_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.checkpoint(tmp_path / "hf", "gpt2")
    argv = ["-m", str(tmp_path / "hf"), "-o"]
    assert main(["auto-opt", *argv, str(tmp_path / "onnx"), "--max_kl", "1e-5"]) == 0
    assert main(["quantize", *argv, str(tmp_path / "q"), "--algorithm", "rtn"]) != 0
    said = capsys.readouterr().err
    assert "no list of decoder layers with Linear modules" in said
    assert "olive auto-opt --precision int4" in said


def test_an_unknown_family_is_built_by_genai_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny.checkpoint(tmp_path / "hf", "gemma", head_dim=16)
    argv = ["auto-opt", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "onnx"), "--max_kl", "0.01"]
    assert main(argv) == 0
    assert "using GenAI's model builder" in caplog.text
    capsys.readouterr()
    report = json.loads((tmp_path / "onnx.report.json").read_text())
    assert report["steps"][0]["facts"]["engine"].startswith("genai")
    assert report["verification"]["kl_divergence"] < 1e-6


def test_a_head_that_differs_from_tied_embeddings_is_the_one_that_counts(tmp_path: Path) -> None:
    """transformers unties such a pair, whatever config.json says."""
    tiny.checkpoint(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = load(tmp_path / "hf")(ids).logits
    found = torch.cat(list(checkpoint_logits(Model("hf", tmp_path / "hf"), ids, "cpu")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    argv = ["quantize", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "q"), "--algorithm", "rtn"]
    assert main([*argv, "--precision", "int8", "--format", "olive", "--lm_head", "int8", "--max_kl", "0.01"]) == 0
    quantized = Checkpoint(tmp_path / "q").quantized
    assert "lm_head" in quantized
    assert "model.embed_tokens" not in quantized
