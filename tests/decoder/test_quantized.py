"""Integers reach the ONNX file bit for bit, and stand there for the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import tiny
from olive.decoder import weights
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.formats import FORMATS
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.shards import ShardWriter
from olive.runtime.session import OnnxDecoder

EXACT = Options(lm_head="float", embeddings="float", accuracy_level=0)


def quantize(source: Path, out: Path, method: str, bits: int, group_size: int, *, symmetric: bool) -> dict:
    """Write a checkpoint with every linear of the layers rounded; return the integers by module."""
    out.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    float_checkpoint, writer = Checkpoint(source), ShardWriter(out)
    found = {}
    for name in float_checkpoint.float_names:
        module, weight = name.removesuffix(".weight"), float_checkpoint.weight(name)
        if "_proj" in name and weight.ndim == 2:
            size = weight.shape[1] if group_size == -1 else group_size
            found[module] = round_to_nearest(weight, bits, size, symmetric=symmetric)
            for part, tensor in FORMATS[method].pack(found[module]).items():
                writer.add(f"{module}.{part}", tensor)
        else:
            writer.add(name, weight)
    writer.close()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = FORMATS[method].settings(bits, group_size, symmetric, found)
    (out / "config.json").write_text(json.dumps(config))
    return found


def dequantized(model: torch.nn.Module, found: dict[str, QuantizedWeight]) -> torch.nn.Module:
    for module, weight in found.items():
        model.get_submodule(module).weight.data = weight.dequantize()
    return model


def integers(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read codes [N, K], scales and zero points [N, G] of every MatMulNBits of a folder, unpacked the slow way."""
    model = onnx.load(folder / "model.onnx")
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        n, k, bits, groups = values["N"], values["K"], values["bits"], values["K"] // values["block_size"]

        def unpack(packed: np.ndarray, count: int, n: int = n, bits: int = bits) -> np.ndarray:
            flat = np.unpackbits(packed.reshape(n, -1), axis=1, bitorder="little")[:, : count * bits]
            return np.packbits(flat.reshape(n, count, bits), axis=2, bitorder="little").reshape(n, count)

        zeros = np.full((n, groups), 1 << (bits - 1), np.uint8)
        if len(node.input) > 3 and node.input[3]:
            zeros = unpack(arrays[node.input[3]], groups)
        found[node.name.removesuffix(".MatMulNBits")] = (unpack(arrays[node.input[1]], k), arrays[node.input[2]], zeros)
    return found


CASES: dict[str, tuple[str, dict[str, Any], str, int, int, bool]] = {
    "awq, packed q k v": ("llama", {}, "awq", 4, 32, False),
    "awq, biases": ("qwen2", {}, "awq", 4, 32, False),
    "gptq, symmetric": ("qwen3", {"head_dim": 32}, "gptq", 4, 16, True),
    "gptq, 8 bits": ("phi3", {}, "gptq", 8, 32, False),
    "gptq, 2 bits": ("mistral", {}, "gptq", 2, 16, False),
    "gptq, one group per channel": ("phi3", {}, "gptq", 4, -1, False),
    "gptq, groups of 48": ("llama", {"hidden_size": 192, "intermediate_size": 96}, "gptq", 4, 48, False),
}


@pytest.mark.parametrize("case", CASES)
def test_integers_are_carried_over(case: str, tmp_path: Path) -> None:
    family, changes, method, bits, group_size, symmetric = CASES[case]
    model = tiny.checkpoint(tmp_path / "hf", family, **changes)
    found = quantize(tmp_path / "hf", tmp_path / "q", method, bits, group_size, symmetric=symmetric)
    facts = build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    stored = integers(tmp_path / "onnx")
    for module, (codes, scale, zeros) in stored.items():
        prefix = module.removesuffix("qkv_proj")
        parts = [found[m] for m in ([module] if module in found else [f"{prefix}{p}_proj" for p in "qkv"])]
        want = weights.concatenate([p for part in parts if (p := weights.regroup(part))])
        assert np.array_equal(codes, want.codes.numpy()), module
        assert np.array_equal(scale, want.scale.float().numpy()), module
        assert np.array_equal(zeros, want.zero_point.numpy()), module
    assert {facts["bits"][m] for m in found} == {bits}
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-3


def test_mixed_bits_in_q_k_v_become_separate_products(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    found = quantize(tmp_path / "hf", tmp_path / "q", "gptq", 4, 32, symmetric=False)
    module = "model.layers.0.self_attn.k_proj"
    source, writer = Checkpoint(tmp_path / "q"), ShardWriter(tmp_path / "m")
    (tmp_path / "m").mkdir()
    found[module] = round_to_nearest(Checkpoint(tmp_path / "hf").weight(f"{module}.weight"), 8, 16, symmetric=False)
    for name in source.tensors:
        if not name.startswith(module):
            writer.add(name, source.tensors[name])
    for part, tensor in FORMATS["gptq"].pack(found[module]).items():
        writer.add(f"{module}.{part}", tensor)
    writer.close()
    config = source.config
    config["quantization_config"]["dynamic"] = {r"+:.*layers\.0\.self_attn\.k_proj$": {"bits": 8, "group_size": 16}}
    for file in (tmp_path / "hf").glob("*.json"):
        shutil.copyfile(file, tmp_path / "m" / file.name)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    facts = build(Checkpoint(tmp_path / "m"), tmp_path / "onnx", EXACT)
    assert facts["bits"][module] == 8
    assert facts["bits"]["model.layers.0.self_attn.q_proj"] == 4
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-3


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float_linears_are_rounded_in_stream(precision: Any, bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "qwen2")
    options = Options(precision, symmetric=symmetric, lm_head="float", embeddings="float", accuracy_level=0)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    linears = {n: m.weight.data for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    rounded = {name: round_to_nearest(w, bits, 32, symmetric=symmetric) for name, w in linears.items()}
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, rounded)(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-3


def test_a_linear_that_no_group_divides_stays_float_and_is_reported(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", intermediate_size=100)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4"))
    assert set(facts["fallbacks"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert "100 channels" in facts["fallbacks"]["model.layers.0.mlp.down_proj"]
    assert facts["bits"]["model.layers.0.mlp.down_proj"] == "float"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_odd_rows_fill_whole_bytes(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 80), dtype=torch.uint8)
    zero_point = torch.randint(0, 1 << bits, (3, 5), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(3, 5), zero_point, bits, False)
    zeros = weights.blocks(weight)[2]
    assert zeros is not None and zeros.shape == (3, -(-5 * bits // 8))
    for row in range(3):
        number = int.from_bytes(zeros[row].tobytes(), "little")
        assert [number >> (i * bits) & ((1 << bits) - 1) for i in range(5)] == weight.zero_point[row].tolist()
