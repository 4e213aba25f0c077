"""Integers reach the ONNX file bit for bit, and stand there for the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import tiny
from olive.cli import main
from olive.decoder import weights
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, fitting_group, pack_bytes, round_to_nearest
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder
from quantized import EMBEDDINGS, HEAD, dequantized, quantize

EXACT = Options(lm_head="float", embeddings="float", accuracy_level=0)


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
    "gptq, 3 bits": ("llama", {}, "gptq", 3, 32, False),
    "gptq, 3 bits, symmetric": ("llama", {}, "gptq", 3, 16, True),
    "gptq, 2 bits": ("mistral", {}, "gptq", 2, 16, False),
    "gptq, one group per channel": ("phi3", {}, "gptq", 4, -1, False),
    "gptq, groups of 48": ("llama", {"hidden_size": 192, "intermediate_size": 96}, "gptq", 4, 48, False),
    "compressed-tensors": ("qwen3", {"head_dim": 32}, "compressed-tensors", 4, 32, False),
    "compressed-tensors, 3 bits": ("phi3", {}, "compressed-tensors", 3, 32, False),
    "compressed-tensors, symmetric": ("llama", {}, "compressed-tensors", 8, -1, True),
    "olive": ("phi3", {}, "olive", 4, 32, False),
    "olive, 2 bits, symmetric": ("llama", {}, "olive", 2, 16, True),
}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(OnnxDecoder(folder, 1).logits(ids.numpy()))


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
        assert np.array_equal(codes, torch.cat([p.codes for p in parts]).numpy()), module
        repeats = scale.shape[1] // parts[0].scale.shape[1]  # groups that the operator does not take are cut up
        wanted = [torch.cat([getattr(p, name) for p in parts]) for name in ("scale", "zero_point")]
        assert np.array_equal(scale, wanted[0].float().repeat_interleave(repeats, dim=1).numpy()), module
        assert np.array_equal(zeros, wanted[1].repeat_interleave(repeats, dim=1).numpy()), module
    assert {facts["bits"][m] for m in found} == {4 if bits == 3 else bits}
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)(ids).logits
    assert (logits(tmp_path / "onnx", ids) - expected).abs().max() < 1e-3


def test_mixed_bits_in_q_k_v_become_separate_products(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    module = "model.layers.0.self_attn.k_proj"
    found = quantize(tmp_path / "hf", tmp_path / "q", "gptq", 4, 32, symmetric=False, other={module: (8, 16)})
    facts = build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)
    assert facts["bits"][module] == 8
    assert facts["bits"]["model.layers.0.self_attn.q_proj"] == 4
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)(ids).logits
    assert (logits(tmp_path / "onnx", ids) - expected).abs().max() < 1e-3


def table(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the attributes of the graph's GatherBlockQuantized and the arrays of its table by their short names."""
    model = onnx.load(folder / "model.onnx")
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    (node,) = [n for n in model.graph.node if n.op_type == "GatherBlockQuantized"]
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return values, {name.rpartition(".")[2]: arrays[name] for name in node.input if name in arrays}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (4, 32), (8, -1)])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_integers_are_carried_over(
    tied: bool, bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    other = {EMBEDDINGS: (bits, group_size)} | ({} if tied else {HEAD: (8, 32)})
    found = quantize(tmp_path / "hf", tmp_path / "q", "olive", 4, 32, symmetric=symmetric, other=other)
    facts = build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)
    assert (facts["bits"][EMBEDDINGS], facts["bits"][HEAD]) == (bits, bits if tied else 8)
    names = {i.name for i in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer}
    assert ("lm_head.qweight" in names) != tied  # a tied head reads the table of the embeddings
    values, arrays = table(tmp_path / "onnx")
    assert values["bits"] == bits
    assert np.array_equal(arrays["rows"], pack_bytes(found[EMBEDDINGS].codes, bits).numpy())
    stored = integers(tmp_path / "onnx")
    head = found[EMBEDDINGS if tied else HEAD]
    assert np.array_equal(stored[HEAD][0], head.codes.numpy())
    assert np.array_equal(stored[HEAD][1], head.scale.float().numpy())
    assert np.array_equal(stored[HEAD][2], head.zero_point.numpy())
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)
        expected.tie_weights()
        assert (logits(tmp_path / "onnx", ids) - expected(ids).logits).abs().max() < 1e-3


def test_a_table_whose_groups_no_operator_takes_becomes_float_and_is_reported(tmp_path: Path) -> None:
    changes = {"hidden_size": 56, "head_dim": 16, "tie_word_embeddings": True}
    model = tiny.checkpoint(tmp_path / "hf", "llama", **changes)
    found = quantize(tmp_path / "hf", tmp_path / "q", "olive", 4, -1, symmetric=False, other={EMBEDDINGS: (8, -1)})
    facts = build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)
    assert facts["bits"][EMBEDDINGS] == facts["bits"][HEAD] == "float"
    assert "group size 56" in facts["fallbacks"][EMBEDDINGS]
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, found)
        expected.tie_weights()
        assert (logits(tmp_path / "onnx", ids) - expected(ids).logits).abs().max() < 1e-3


@pytest.mark.usefixtures("cache")
def test_a_head_that_transformers_renames_is_found(tmp_path: Path) -> None:
    """Of GPT-NeoX: embed_out as published, lm_head in what ``olive quantize`` writes."""
    tiny.checkpoint(tmp_path / "hf", "gpt_neox", hidden_size=256)
    assert main(["quantize", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "q"), "--lm_head", "int8"]) == 0
    assert main(["auto-opt", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "onnx")]) == 0


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float_linears_are_rounded_in_stream(precision: Any, bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "qwen2")
    options = Options(
        precision, group_size=32, symmetric=symmetric, lm_head="float", embeddings="float", accuracy_level=0
    )
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    linears = {n: m.weight.data for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    rounded = {name: round_to_nearest(w, bits, 32, symmetric=symmetric) for name, w in linears.items()}
    ids = tiny.ids(40)
    with torch.no_grad():
        expected = dequantized(model, rounded)(ids).logits
    assert (logits(tmp_path / "onnx", ids) - expected).abs().max() < 1e-3


def test_a_linear_that_no_group_divides_stays_float_and_is_reported(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", intermediate_size=100)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4"))
    assert set(facts["fallbacks"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert "100 channels" in facts["fallbacks"]["model.layers.0.mlp.down_proj"]
    assert facts["bits"]["model.layers.0.mlp.down_proj"] == "float"


@pytest.mark.parametrize(("hidden_size", "inner"), [(64, 40), (72, 96)])
def test_experts_stay_float_together_and_are_reported(hidden_size: int, inner: int, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "qwen3_moe", hidden_size=hidden_size, moe_intermediate_size=inner)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4", group_size=32))
    experts = {name for name in facts["bits"] if ".experts." in name}
    assert len(experts) == 2 * 6 * 3
    assert {facts["bits"][name] for name in experts} == {"float"}
    assert experts <= set(facts["fallbacks"])


def test_experts_are_rounded_in_groups_that_divide_both_their_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from decoder.test_every_family import linears

    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")
    model = tiny.checkpoint(tmp_path / "hf", "qwen3_moe", hidden_size=128, moe_intermediate_size=96)
    options = Options("int4", group_size=128, lm_head="float", embeddings="float", accuracy_level=0)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", options)
    assert {bits for name, bits in facts["bits"].items() if ".experts." in name} == {4}
    for name, weight in linears(model):
        size = 32 if ".experts." in name else fitting_group(weight.shape[1], 128)
        assert size is not None
        weight.copy_(round_to_nearest(weight.contiguous(), 4, size, symmetric=False).dequantize())
    ids = tiny.ids(40)
    with torch.no_grad():
        assert (logits(tmp_path / "onnx", ids) - model(ids).logits).abs().max() < 1e-3


def test_experts_that_are_stored_in_different_groups_are_told_with_what_would_do(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "qwen3_moe", hidden_size=128, moe_intermediate_size=96)
    quantize(tmp_path / "hf", tmp_path / "q", "gptq", 4, 128, symmetric=False)
    with pytest.raises(ConfigError, match=r"have 4 bits by 128, 4 bits by 32; .* group size that divides 128 and 96 "):
        build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)


@pytest.mark.parametrize(("family", "router"), [("qwen3_moe", "mlp.gate"), ("mixtral", "block_sparse_moe.gate")])
def test_a_router_of_integers_becomes_float(family: str, router: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", family)
    name = f"model.layers.0.{router}"
    other = {name: (4, 16)}
    found = quantize(tmp_path / "hf", tmp_path / "q", "compressed-tensors", 4, 16, symmetric=False, other=other)
    build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)
    arrays = {i.name: i for i in onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer}
    stored = numpy_helper.to_array(arrays[f"{name}.weight"])
    assert np.array_equal(stored, found[name].dequantize().t().numpy())


@pytest.mark.parametrize(
    ("method", "part"),
    [("gptq", "scales"), ("gptq", "qzeros"), ("awq", "qzeros"), ("compressed-tensors", "weight_shape")],
)
def test_a_part_of_a_weight_is_missing(method: str, part: str, tmp_path: Path) -> None:
    module = "model.layers.1.mlp.up_proj"
    tiny.checkpoint(tmp_path / "hf", "llama")
    quantize(tmp_path / "hf", tmp_path / "q", method, 4, 32, symmetric=False)
    (file,) = (tmp_path / "q").glob("*.safetensors")
    save_file({n: t for n, t in load_file(file).items() if n != f"{module}.{part}"}, file)
    with pytest.raises(ConfigError, match=f"{module}: {part} is missing"):
        build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)


def test_config_that_tells_other_bits(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    quantize(tmp_path / "hf", tmp_path / "q", "gptq", 4, 32, symmetric=False)
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["bits"] = 8
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="do not fit; see whether quantization_config"):
        build(Checkpoint(tmp_path / "q"), tmp_path / "onnx", EXACT)


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
