"""Checkpoint layouts: each word where the formats' own definitions put it, and back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantized
import tiny
from olive.cli import main
from olive.errors import ConfigError
from olive.passes.quantizer import BITS
from olive.quant.affine import QuantizedWeight, pack_bits, pack_bytes, round_to_nearest, unpack_bits, unpack_bytes
from olive.quant.formats import FORMATS, awq, compressed_tensors, gptq, holds, olive
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.layout import Layout
from olive.quant.formats.shards import Shards, ShardWriter
from olive.quant.formats.writer import CheckpointWriter, Grouping, choose_groups, quantization_config, realised_bits
from olive.runtime.torch_model import load

UP = "model.layers.0.mlp.up_proj"
CASES = [
    (method, bits, symmetric) for method in FORMATS for bits in FORMATS[method].BITS for symmetric in (False, True)
]


def weight(bits: int, symmetric: bool, n: int = 32, k: int = 256, group: int = 32) -> QuantizedWeight:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(7))
    return round_to_nearest(values, bits, k if group == -1 else group, symmetric=symmetric)


def assert_same(after: QuantizedWeight, before: QuantizedWeight) -> None:
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(after, part), getattr(before, part)), part
    assert after.codes.dtype == after.zero_point.dtype == torch.uint8
    assert (after.bits, after.group_size, after.symmetric) == (before.bits, before.group_size, before.symmetric)
    assert torch.equal(after.dequantize(), before.dequantize())


def stream(row: list[int], bits: int) -> int:
    """Write numbers one after another, low bits first, as one long number."""
    return sum(value << (i * bits) for i, value in enumerate(row))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 10, 11, 32, 33])
def test_rows_are_packed_as_one_stream_of_bits(bits: int, count: int) -> None:
    values = torch.randint(
        0, 1 << bits, (2, 3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    in_bytes, in_words = pack_bytes(values, bits), pack_bits(values, bits)
    assert in_bytes.shape == (2, 3, -(-count * bits // 8))
    assert in_words.shape == (2, 3, -(-count * bits // 32))
    for packed in (in_bytes, in_words):
        for at in ((0, 0), (1, 2)):
            assert int.from_bytes(packed[at].numpy().tobytes(), "little") == stream(values[at].tolist(), bits)
    assert torch.equal(unpack_bytes(in_bytes, bits, count), values)
    assert torch.equal(unpack_bits(in_words, bits, count), values)


@pytest.mark.parametrize("group", [16, 32, 128, -1])
@pytest.mark.parametrize(("method", "bits", "symmetric"), CASES)
def test_layouts_read_back_bit_for_bit(method: str, bits: int, symmetric: bool, group: int) -> None:
    before, layout = weight(bits, symmetric, group=group), FORMATS[method]
    groups = choose_groups({UP: (32, 256)}, method, bits, group)
    assert groups == {UP: Grouping(bits, before.group_size, group == -1)}
    own = layout.module_settings(quantization_config(method, bits, group, symmetric, groups), UP)
    assert own["bits"] == bits
    assert_same(layout.unpack(layout.pack(before), own, "here"), before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_olive_reads_one_scale_for_all_of_a_weight(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (4, 16), dtype=torch.uint8)
    parts = {"qweight": pack_bytes(codes, bits), "scales": torch.tensor([[0.5]]), "qzeros": torch.tensor([[1]]).byte()}
    own = {"bits": bits, "group_size": 0, "symmetric": False}
    found = olive.unpack(parts, own, "here")
    assert torch.equal(found.dequantize(), (codes.float() - 1) * 0.5)
    assert found.scale.shape == found.zero_point.shape == (4, 1)


def test_awq_words_hold_channels_in_the_published_order() -> None:
    before = weight(4, False, n=16, k=64)
    packed = awq.pack(before)
    assert packed["qweight"].shape == (64, 2)
    for k, word, place in ((0, 0, 0), (5, 1, 3), (63, 1, 7)):
        nibble = (packed["qweight"][k, word].item() >> (4 * place)) & 15
        assert nibble == before.codes[8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[place], k]


@pytest.mark.parametrize(("symmetric", "offset"), [(True, 1), (False, 0)])
def test_gptq_words_run_along_the_input_and_v1_stores_zero_minus_one(symmetric: bool, offset: int) -> None:
    before = weight(4, symmetric, n=16, k=64)
    packed = gptq.pack(before)
    assert packed["qweight"].shape == (8, 16)
    assert (packed["qweight"][1, 3].item() >> 8) & 15 == before.codes[3, 10]
    assert (packed["qzeros"][1, 0].item() >> 4) & 15 == before.zero_point[1, 1] - offset
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_gptq_with_3_bits_holds_10_11_and_11_values_with_two_across_words() -> None:
    before = weight(3, False, n=32, k=64)
    packed = gptq.pack(before)
    assert packed["qweight"].shape == (6, 32)
    assert packed["qzeros"].shape == (2, 3)
    for n, start in ((0, 0), (9, 32)):
        codes = before.codes[n, start : start + 32].tolist()
        words = [packed["qweight"][start // 32 * 3 + i, n].item() & 0xFFFFFFFF for i in range(3)]
        assert words[0] == stream(codes[:10], 3) | (codes[10] & 3) << 30
        assert words[1] == codes[10] >> 2 | stream(codes[11:21], 3) << 1 | (codes[21] & 1) << 31
        assert words[2] == codes[21] >> 1 | stream(codes[22:], 3) << 2


@pytest.mark.parametrize("bits", compressed_tensors.BITS)
def test_compressed_tensors_hold_signed_codes_raised_by_half_their_range(bits: int) -> None:
    before = weight(bits, False, n=12, k=80, group=16)
    packed = compressed_tensors.pack(before)
    assert packed["weight_shape"].tolist() == [12, 80]
    assert packed["weight_packed"].shape == (12, -(-80 * bits // 32))
    assert packed["weight_zero_point"].shape == (-(-12 * bits // 32), 5)
    row = int.from_bytes(packed["weight_packed"][3].numpy().tobytes(), "little")
    column = int.from_bytes(packed["weight_zero_point"][:, 2].contiguous().numpy().tobytes(), "little")
    signed = [(row >> (i * bits) & (1 << bits) - 1) - (1 << bits - 1) for i in range(80)]
    zero = (column >> (3 * bits) & (1 << bits) - 1) - (1 << bits - 1)
    in_group = [(code - zero) * before.scale[3, 2].float().item() for code in signed[32:48]]
    assert in_group == before.dequantize()[3, 32:48].tolist()
    assert "weight_zero_point" not in compressed_tensors.pack(weight(bits, True))


def test_older_compressed_tensors_are_refused_by_name() -> None:
    own = {"bits": 3, "group_size": 32, "symmetric": False}
    parts = compressed_tensors.pack(weight(3, False))
    ten_a_word = parts | {"weight_packed": torch.zeros(32, 26, dtype=torch.int32)}
    with pytest.raises(ConfigError, match=r"up: \[32, 26\] words .* expected \[32, 24\]; save it again"):
        compressed_tensors.unpack(ten_a_word, own, "up")
    with pytest.raises(ConfigError, match=r"up: asymmetric.*torch.int8; save"):
        compressed_tensors.unpack(parts | {"weight_zero_point": torch.zeros(32, 8, dtype=torch.int8)}, own, "up")


ENDS = {quantized.EMBEDDINGS: (8, 16), quantized.HEAD: (8, 64)}
OTHER: dict[str, dict[str, tuple[int, int]]] = {
    "awq": {},
    "gptq": {UP: (8, -1), "model.layers.1.self_attn.k_proj": (2, 16), quantized.HEAD: ENDS[quantized.HEAD]},
    "compressed-tensors": {UP: (8, -1), "model.layers.1.self_attn.k_proj": (3, 16), quantized.HEAD: (8, 64)},
    "olive": {UP: (8, -1), "model.layers.1.self_attn.k_proj": (2, 16), **ENDS},
}
"""Modules with bits and groups of their own in one checkpoint, as far as the layout holds that."""


@pytest.mark.parametrize(("method", "bits", "symmetric"), CASES)
def test_a_checkpoint_of_mixed_settings_gives_back_its_integers(
    tmp_path: Path, method: str, bits: int, symmetric: bool
) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    modules = quantized.quantize(
        tmp_path / "hf", tmp_path / "q", method, bits, 32, symmetric=symmetric, other=OTHER[method]
    )
    checkpoint = Checkpoint(tmp_path / "q")
    assert sorted(checkpoint.quantized) == sorted(modules)
    assert len(modules) == 14 + len(ENDS.keys() & OTHER[method].keys())
    assert realised_bits(checkpoint) == {name: OTHER[method].get(name, (bits, 32))[0] for name in modules}
    for name, before in modules.items():
        assert_same(checkpoint.quantized_weight(name), before)
        assert checkpoint.linear_shape(name) == before.codes.shape
        assert torch.equal(checkpoint.weight(f"{name}.weight"), before.dequantize())
    ids = tiny.ids(12)
    with torch.no_grad():
        expected = quantized.dequantized(model, modules)(ids).logits
        torch.testing.assert_close(
            load(tmp_path / "q")(ids).logits, expected, rtol=0, atol=1e-4
        )  # sums in another order


@pytest.mark.parametrize("bits", olive.BITS)
def test_tied_tables_are_stored_and_read_once(tmp_path: Path, bits: int) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=True)
    other = {quantized.EMBEDDINGS: (bits, 16)}
    modules = quantized.quantize(tmp_path / "hf", tmp_path / "q", "olive", 4, 32, symmetric=False, other=other)
    checkpoint = Checkpoint(tmp_path / "q")
    said = checkpoint.config["quantization_config"]
    assert (said["embeds"], said["lm_head"], said["tie_word_embeddings"]) == (True, True, True)
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors)
    loaded = load(tmp_path / "q")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = tiny.ids(12)
    with torch.no_grad():
        expected = quantized.dequantized(model, modules)
        expected.tie_weights()
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=0, atol=1e-4)


def test_a_head_stored_beside_tied_embeddings_is_the_one_that_is_used(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    modules = quantized.quantize(
        tmp_path / "hf", tmp_path / "q", "gptq", 4, 32, symmetric=True, other={"lm_head": (8, 32)}
    )
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ids = tiny.ids(12)
    with torch.no_grad():
        expected = quantized.dequantized(model, modules)(ids).logits
        torch.testing.assert_close(load(tmp_path / "q")(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("method", FORMATS)
def test_dequantize_writes_what_the_integers_stand_for(tmp_path: Path, method: str) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    modules = quantized.quantize(tmp_path / "hf", tmp_path / "q", method, 4, 32, symmetric=False, other=OTHER[method])
    assert main(["dequantize", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "f")]) == 0
    found = load_file(tmp_path / "f" / "model.safetensors")
    expected = quantized.dequantized(model, modules).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "f" / "config.json").read_text())


def test_scales_in_bfloat16_are_kept_exactly(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    quantized.quantize(tmp_path / "hf", tmp_path / "q", "compressed-tensors", 4, 32, symmetric=False)
    tensors = {
        name: t.bfloat16() if "scale" in name else t
        for name, t in load_file(tmp_path / "q" / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    found = Checkpoint(tmp_path / "q").quantized_weight(UP)
    assert torch.equal(found.scale, tensors[f"{UP}.weight_scale"].float())
    assert torch.equal(load(tmp_path / "q").get_submodule(UP).weight, found.dequantize())


def test_per_module_settings_are_found_by_name_and_pattern() -> None:
    dynamic = {"-:.*gate": {}, r"+:.*\.0\..*up": {"bits": 8, "sym": True}, ".*up": {"group_size": 64}}
    own = {"bits": 4, "group_size": 32, "sym": False, "dynamic": dynamic}
    found = [gptq.module_settings(own, f"layers.{i}.{name}") for i, name in ((0, "up"), (1, "up"), (0, "down"))]
    assert [(f["bits"], f["group_size"], f["sym"]) for f in found] == [(8, 32, True), (4, 64, False), (4, 32, False)]
    overrides = {"re:.*up": {"bits": 8}, "a.up": {"bits": 2}, "re:a[.]b[.]up": {"bits": 8, "symmetric": True}}
    own = {"bits": 4, "group_size": 32, "symmetric": False, "overrides": overrides}
    found = [olive.module_settings(own, name) for name in ("a.up", "a.b.up", "up.down")]
    assert [(f["bits"], f["symmetric"]) for f in found] == [(8, False), (8, True), (4, False)]
    sizes = {"Linear": 32, "re:.*up": 64, "a.up": 128}
    groups = {
        str(i): {"targets": [t], "weights": {"num_bits": 4, "group_size": s}} for i, (t, s) in enumerate(sizes.items())
    }
    found = [compressed_tensors.module_settings({"config_groups": groups}, name) for name in ("a.up", "b.up", "c")]
    assert [f["group_size"] for f in found] == [128, 64, 32]
    del groups["0"]
    with pytest.raises(ConfigError, match="no config group has c among its targets"):
        compressed_tensors.module_settings({"config_groups": groups}, "c")


def test_groups_that_do_not_divide_fall_back_by_layout() -> None:
    shapes = {"a": (64, 128), "b": (64, 96), "c": (64, 100), "d": (60, 128)}
    a, b, d = Grouping(4, 128), Grouping(4, 32), Grouping(4, 128)
    assert choose_groups(shapes, "awq", 4, 128) == {"a": a, "b": None, "c": None, "d": None}
    assert choose_groups(shapes, "gptq", 4, 128) == {"a": a, "b": b, "c": None, "d": None}
    assert choose_groups(shapes, "compressed-tensors", 4, 128) == {"a": a, "b": b, "c": None, "d": d}
    assert choose_groups(shapes, "olive", 4, 128) == {"a": a, "b": b, "c": None, "d": d}
    assert choose_groups({"b": (64, 96)}, "olive", 4, 96) == {"b": b}  # 96 is no power of two
    assert choose_groups({"b": (64, 96)}, "gptq", 4, 96) == {"b": Grouping(4, 96)}


def test_ends_of_the_model_are_held_where_the_layout_can() -> None:
    shapes = {"model.embed_tokens": (64, 128), "lm_head": (64, 128)}
    for method, held in (
        ("awq", []),
        ("gptq", ["lm_head"]),
        ("compressed-tensors", ["lm_head"]),
        ("olive", list(shapes)),
    ):
        assert [name for name, chosen in choose_groups(shapes, method, 4, 32).items() if chosen] == held


@pytest.mark.parametrize("method", FORMATS)
def test_bits_that_a_layout_holds(method: str) -> None:
    layout: Layout = FORMATS[method]
    assert {bits for bits in range(1, 17) if holds(method, bits)} == set(layout.BITS)
    with pytest.raises(ConfigError, match=f"{method}: 5 bits were asked for, it holds .*; no layout holds that"):
        choose_groups({"a": (64, 128)}, method, 5, 32)


def test_the_options_of_the_passes_know_what_the_layouts_hold() -> None:
    assert {method: layout.BITS for method, layout in FORMATS.items()} == BITS


@pytest.mark.parametrize(
    ("method", "module", "chosen", "said"),
    [
        (
            "awq",
            UP,
            Grouping(4, 64),
            "4 bits in groups of 64, but .* 4 bits in groups of 32; use gptq or compressed-tensors or olive",
        ),
        (
            "awq",
            UP,
            Grouping(8, 32),
            "8 bits in groups of 32, but the layout holds 4 bits; use gptq or compressed-tensors or olive",
        ),
        ("olive", UP, Grouping(3, 32), "3 bits .* the layout holds 2, 4, 8 bits; use gptq or compressed-tensors"),
        ("gptq", "model.embed_tokens", Grouping(8, 32), "does not hold embeddings; use olive"),
        ("awq", "lm_head", Grouping(4, 32), "does not hold lm_head; use gptq or compressed-tensors or olive"),
    ],
)
def test_a_choice_that_a_layout_does_not_hold_is_refused(method: str, module: str, chosen: Grouping, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{method}: {module}: asked for .*{said}"):
        quantization_config(method, 4, 32, False, {"model.layers.0.mlp.down_proj": Grouping(4, 32), module: chosen})


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"version": None, "format": "gemv"}, "gemv"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'; only gptq and gptq_v2 are read"),
        ("gptq", {"bits": 5}, "5 bits; only 2, 3, 4, 8 are read"),
        ("olive", {"overrides": {UP: {"bits": 3}}}, "3 bits; only 2, 4, 8 are read"),
        ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, "without config groups that are written out"),
        ("compressed-tensors", {"format": "int-quantized"}, "format 'int-quantized'; only pack-quantized"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 6}}}},
            "g has 6 bits of int by channel",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"input_activations": {"num_bits": 8}}}},
            "quantizes activations",
        ),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "block"}}}}, "by block"),
    ],
)
def test_variants_that_are_not_read_are_refused(method: str, change: dict[str, Any], said: str) -> None:
    own = quantization_config(method, 4, 32, False, {UP: Grouping(4, 32)})
    FORMATS[method].check(own, "folder")
    with pytest.raises(ConfigError, match=f"folder: .*{said}"):
        FORMATS[method].check(own | change, "folder")


def write(folder: Path, method: str) -> None:
    """Write a checkpoint of one quantized linear to ``folder``/out."""
    (folder / "source").mkdir()
    (folder / "out").mkdir()
    writer = CheckpointWriter(folder / "source", folder / "out")
    writer.quantized(UP, weight(4, False), method)
    own = quantization_config(method, 4, 32, False, {UP: Grouping(4, 32)})
    writer.close({"model_type": "llama", "quantization_config": own})


@pytest.mark.parametrize(("method", "codes"), [("gptq", "qweight"), ("compressed-tensors", "weight_packed")])
def test_a_config_that_calls_float_weights_quantized_is_refused(tmp_path: Path, method: str, codes: str) -> None:
    write(tmp_path, method)
    save_file({f"{UP}.weight": torch.ones(2, 2)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"no tensor is named \*\.{codes}"):
        Checkpoint(tmp_path / "out")


@pytest.mark.parametrize("method", FORMATS)
def test_integers_that_config_json_does_not_tell_of_are_not_taken_for_missing_weights(
    tmp_path: Path, method: str
) -> None:
    """As AutoGPTQ and AutoAWQ wrote them in 2023, and compressed-tensors at first under another name."""
    tiny.checkpoint(tmp_path / "hf", "llama")
    quantized.quantize(tmp_path / "hf", tmp_path / "q", method, 4, 32, symmetric=True)
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    config["compression_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"holds packed integers, but config\.json has no quantization_config; "):
        Checkpoint(tmp_path / "q")


def test_gptq_v2_is_known_by_either_name(tmp_path: Path) -> None:
    """transformers 5 and GPTQModel say ``format`` where they once said ``checkpoint_format``."""
    write(tmp_path, "gptq")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format"] = config["quantization_config"].pop("checkpoint_format")
    path.write_text(json.dumps(config))
    assert_same(Checkpoint(tmp_path / "out").quantized_weight(UP), weight(4, False))


@pytest.mark.parametrize("method", FORMATS)
def test_tensors_that_lack_or_do_not_fit_are_named(tmp_path: Path, method: str) -> None:
    write(tmp_path, method)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    scales = f"{UP}.weight_scale" if method == "compressed-tensors" else f"{UP}.scales"
    column = tensors[scales].shape.index(8)
    save_file(tensors | {scales: tensors[scales].narrow(column, 0, 4).contiguous()}, file)
    with pytest.raises(ConfigError, match=f"{UP}: codes .* do not fit"):
        Checkpoint(tmp_path / "out").quantized_weight(UP)
    save_file({name: tensor for name, tensor in tensors.items() if name != scales}, file)
    with pytest.raises(ConfigError, match=f"{UP}: {scales.removeprefix(UP + '.')} is missing"):
        Checkpoint(tmp_path / "out").quantized_weight(UP)
    if method in ("awq", "gptq", "olive"):
        with pytest.raises(ConfigError, match=f"{UP}: {scales.removeprefix(UP + '.')} is missing"):
            Checkpoint(tmp_path / "out").linear_shape(UP)


def test_shards_are_split_and_indexed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=100)
    tensors = {f"t{i}": torch.full((5,), float(i)) for i in range(12)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                             "model-00003-of-00003.safetensors"]  # fmt: skip
    found = Shards(files)
    assert sorted(found) == sorted(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    by_library = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(by_library[name], tensor) for name, tensor in tensors.items())


def test_more_tensors_than_expected_begin_another_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, tensors=2)
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.bfloat16) for i in range(5)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("keep", [3, 60, -5])
def test_truncated_safetensors_are_refused_by_name(tmp_path: Path, keep: int) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(64))
    writer.close()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors: (not a safetensors file|truncated)"):
        Shards([path])


def test_activation_order_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    checkpoint = Checkpoint(tmp_path / "out")
    name = checkpoint.quantized[0]
    mixed = dict(checkpoint.tensors.items()) | {f"{name}.g_idx": torch.randperm(256).to(torch.int32) // 32}
    checkpoint.tensors = mixed  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="activation order"):
        checkpoint.quantized_weight(name)


def test_an_unknown_quantization_method_is_named(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"gptq"', '"hqqq"'))
    with pytest.raises(ConfigError, match="hqqq"):
        Checkpoint(tmp_path / "out")


def test_asking_for_a_name_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(4))
    writer.add("empty", torch.zeros(0, 3))
    writer.close()
    shards = Shards([tmp_path / "model.safetensors"])
    assert shards["empty"].shape == (0, 3)
    monkeypatch.setattr(Shards, "__getitem__", None)
    assert "t" in shards
    assert "u" not in shards
