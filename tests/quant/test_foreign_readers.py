"""What we write is read by others as the same weights: the packages whose layouts they are, and GenAI's builder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import quantized
import tiny
from olive.quant.affine import round_to_nearest
from olive.quant.formats import compressed_tensors
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.writer import Grouping, quantization_config
from olive.runtime.torch_model import load

SETTINGS = [
    (bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (16, 32, 128, -1) for symmetric in (False, True)
]
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("bits", "group", "symmetric"), SETTINGS)
def test_compressed_tensors_decompresses_to_our_weights(bits: int, group: int, symmetric: bool) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    weight = round_to_nearest(torch.randn(24, 384), bits, 384 if group == -1 else group, symmetric=symmetric)
    assert (weight.scale < 0).any() == symmetric  # negative scales are what others might not expect
    own = quantization_config(
        "compressed-tensors", bits, group, symmetric, {UP: Grouping(bits, weight.group_size, group == -1)}
    )
    parts = compressed_tensors.pack(weight)
    parts["weight_scale"] = parts["weight_scale"].float()  # the package computes in the scale's type
    reader = compressors.BaseCompressor.get_value_from_registry(own["format"])
    found = reader.decompress(parts, scheme.model_validate(own["config_groups"]["group_0"]))["weight"]
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (4, -1), (8, 64)])
def test_transformers_runs_our_symmetric_compressed_tensors(bits: int, group: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = tiny.checkpoint(tmp_path / "hf", "llama")
    other = {UP: (8, 32), "model.layers.1.self_attn.q_proj": (3, -1), quantized.HEAD: (8, 16)}
    found = quantized.quantize(
        tmp_path / "hf", tmp_path / "q", "compressed-tensors", bits, group, symmetric=True, other=other
    )
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = quantized.dequantized(model, found)(ids).logits
        torch.testing.assert_close(foreign(ids).logits, expected, rtol=0, atol=1e-5)  # attention sums in another order
    for name, weight in found.items():  # decompressed by the first run
        assert torch.equal(foreign.get_submodule(name).weight, weight.dequantize()), name


def test_transformers_reads_all_experts_by_the_largest_config_group(tmp_path: Path) -> None:
    """It takes the first one for them, whatever the targets say; experts come out in the scales' float16."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    tiny.checkpoint(tmp_path / "hf", "mixtral")
    other = {quantized.HEAD: (4, 32), **{f"model.layers.{i}.self_attn.q_proj": (4, 16) for i in (0, 1)}}
    linears = {n.removesuffix(".weight") for n in Checkpoint(tmp_path / "hf").float_names if ".experts." in n}
    experts = dict.fromkeys(linears, (8, 32))
    quantized.quantize(
        tmp_path / "hf", tmp_path / "q", "compressed-tensors", 4, 32, symmetric=True, other=other | experts
    )
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = tiny.ids(20)
    with torch.no_grad():
        torch.testing.assert_close(foreign(ids).logits, load(tmp_path / "q")(ids).logits, rtol=0, atol=0.02)


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (4, -1), (8, 64)])
def test_transformers_runs_our_asymmetric_compressed_tensors(bits: int, group: int, tmp_path: Path) -> None:
    """Only by dequantizing on loading: transformers 5.23 keeps room for zero points that are not packed, and then
    refuses the packed ones. Weights come out in float16, the type of the scales, and all by the first config group."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = tiny.checkpoint(tmp_path / "hf", "llama")
    found = quantized.quantize(tmp_path / "hf", tmp_path / "q", "compressed-tensors", bits, group, symmetric=False)
    foreign = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, weight in found.items():
        rounded = weight.dequantize().half().float()
        assert torch.equal(foreign.get_submodule(name).weight, rounded), name
        model.get_submodule(name).weight.data = rounded
    ids = tiny.ids(20)
    with torch.no_grad():
        torch.testing.assert_close(foreign(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, False), (8, True)])
def test_we_read_what_compressed_tensors_compresses(bits: int, symmetric: bool) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    own = quantization_config("compressed-tensors", bits, 32, symmetric, {UP: Grouping(bits, 32)})
    scheme = quantization.QuantizationScheme.model_validate(own["config_groups"]["group_0"])
    half = 1 << (bits - 1)
    state = {"weight": torch.randn(20, 96), "weight_scale": torch.rand(20, 3) + 0.1}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (20, 3), dtype=torch.int8)
    layout = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = layout.compress(state, scheme)
    found = compressed_tensors.unpack(packed, compressed_tensors.module_settings(own, UP), "here")
    assert torch.equal(found.dequantize(), layout.decompress(packed, scheme)["weight"])


def genai(folder: Path, out: Path, *options: str) -> onnxruntime.InferenceSession:
    """Build a checkpoint with GenAI's builder, its products computed in float32."""
    places = ["-i", str(folder), "-o", str(out), "-c", str(out.with_suffix(".cache"))]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *places, "-p", "int4", "-e", "cpu"]
    command += ["--extra_options", "accuracy_level=1", *options]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("GenAI's builder took more than 60 s on this machine")
    assert ended.returncode == 0, ended.stderr
    return onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("method", "symmetric", "other"),
    [  # what GenAI 0.18 reads: it takes no note of gptq_v2, and needs the zero points of olive's q, k and v
        ("awq", False, {}),
        ("gptq", True, {UP: (8, 16), quantized.HEAD: (4, 32)}),
        ("olive", False, {UP: (8, 16), quantized.HEAD: (8, 64)}),
    ],
)
def test_genai_builds_the_same_model(
    method: str, symmetric: bool, other: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", "llama")
    found = quantized.quantize(tmp_path / "hf", tmp_path / "q", method, 4, 32, symmetric=symmetric, other=other)
    has_head = quantized.HEAD in found  # a float one would be rounded, so it is left out
    session = genai(tmp_path / "q", tmp_path / "onnx", *([] if has_head else ["exclude_lm_head=true"]))
    ids = tiny.ids(20, batch=1)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    past = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
    (output,) = session.run(["logits" if has_head else "hidden_states"], feed | past)
    quantized.dequantized(model, found)
    with torch.no_grad():
        expected = model(ids).logits if has_head else model.model(ids).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=5e-5)  # float32, other kernels
