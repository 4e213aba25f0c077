"""Graphs for GPUs: float16 throughout, in the form that each provider takes. They are run on the CPU here, which
computes the same slowly; no GPU was there to run them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import tiny
from olive.cli import main
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.decoder.provider import PROVIDERS
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder

GPUS = [name for name in PROVIDERS if name != "CPUExecutionProvider"]
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "smollm3", "gpt_neox", "phi3")


def graph(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


@pytest.mark.parametrize("provider", GPUS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float16_graphs_compute_what_transformers_computes(family: str, provider: str, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(provider=provider))
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    found = graph(tmp_path / "onnx")
    kinds = {v.type.tensor_type.elem_type for v in (*found.input, *found.output) if "int" not in v.name}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    difference = np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected)
    assert 1e-6 < difference.mean() < 2e-2  # 11 bits, at logits of about 5


@pytest.mark.parametrize("provider", GPUS)
def test_the_form_is_the_provider_s(provider: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4", group_size=32, provider=provider))
    assert facts["bits"]["model.layers.0.mlp.down_proj"] == 4
    nodes = graph(tmp_path / "onnx").node
    kinds = {node.op_type for node in nodes}
    attention = next(node for node in nodes if node.op_type == "GroupQueryAttention")
    rotates = next(a.i for a in attention.attribute if a.name == "do_rotary")
    dml = provider == "DmlExecutionProvider"
    assert ("RotaryEmbedding" in kinds) == dml
    assert rotates == (0 if dml else 1)
    assert bool(attention.input[1]) == dml  # keys and values of their own
    assert ("QuickGelu" in kinds) == (provider == "CUDAExecutionProvider")
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    (options,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert list(options) == [PROVIDERS[provider].genai]


def test_adapters_are_float16_on_a_gpu(tmp_path: Path) -> None:
    from decoder.test_adapters import train

    tiny.checkpoint(tmp_path / "hf", "llama")
    tuned = train(tmp_path / "a", tmp_path / "hf", ["q_proj", "down_proj"], 4)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(provider=GPUS[0]), [tmp_path / "a"])
    lora.convert(tmp_path / "a", tmp_path / "onnx", tmp_path / "a.onnx_adapter")
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = tuned(ids).logits.numpy()
    found = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy(), tmp_path / "a.onnx_adapter")
    assert np.abs(found - expected).mean() < 2e-2


def test_experts_are_refused_on_a_gpu(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "mixtral")
    with pytest.raises(ConfigError, match="experts are not built for CUDAExecutionProvider; only silu on CPU"):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(provider=GPUS[0]))


@pytest.mark.usefixtures("cache")
def test_auto_opt_for_a_gpu_that_is_not_there_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    argv = ["auto-opt", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "out"), "--device", "gpu"]
    assert main([*argv, "--max_kl", "0.01"]) == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["verification"]["generates"] == "not run: CUDAExecutionProvider is not in this onnxruntime"
    assert report["verification"]["kl_divergence"] < 1e-3
    capsys.readouterr()
    assert main([*argv, "--kv_cache", "int8", "--overwrite"]) == 2
    assert "kv_cache int8: CUDAExecutionProvider keeps the cache in the type" in capsys.readouterr().err
    assert main(["auto-opt", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "x"), "--precision", "fp16"]) == 2
    assert "precision fp16: CPUExecutionProvider computes in float32" in capsys.readouterr().err
