"""Checkpoint layouts: each word where the formats' own definitions put it, and back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.formats import FORMATS, awq, gptq
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.shards import Shards, ShardWriter
from olive.quant.formats.writer import CheckpointWriter, Grouping, choose_groups, quantization_config, realised_bits

CASES = [
    ("awq", 4, False),
    ("awq", 4, True),
    ("gptq", 4, False),
    ("gptq", 4, True),
    ("gptq", 8, False),
    ("gptq", 8, True),
]


def weight(bits: int, symmetric: bool, n: int = 16, k: int = 64, group: int = 32) -> QuantizedWeight:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(7))
    return round_to_nearest(values, bits, group, symmetric=symmetric)


@pytest.mark.parametrize(("method", "bits", "symmetric"), CASES)
def test_layouts_read_back_bit_for_bit(method: str, bits: int, symmetric: bool) -> None:
    before = weight(bits, symmetric)
    layout = FORMATS[method]
    after = layout.unpack(layout.pack(before), layout.settings(bits, 32, symmetric, {}))
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(after, part), getattr(before, part)), part
    assert torch.equal(after.dequantize(), before.dequantize())


def test_awq_words_hold_channels_in_the_published_order() -> None:
    before = weight(4, False)
    packed = awq.pack(before)
    assert packed["qweight"].shape == (64, 2)
    for k, word, place in ((0, 0, 0), (5, 1, 3), (63, 1, 7)):
        nibble = (packed["qweight"][k, word].item() >> (4 * place)) & 15
        assert nibble == before.codes[8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[place], k]


@pytest.mark.parametrize(("symmetric", "offset"), [(True, 1), (False, 0)])
def test_gptq_words_run_along_the_input_and_v1_stores_zero_minus_one(symmetric: bool, offset: int) -> None:
    before = weight(4, symmetric)
    packed = gptq.pack(before)
    assert packed["qweight"].shape == (8, 16)
    assert (packed["qweight"][1, 3].item() >> 8) & 15 == before.codes[3, 10]
    assert (packed["qzeros"][1, 0].item() >> 4) & 15 == before.zero_point[1, 1] - offset
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32


def write(folder: Path, method: str, bits: int, symmetric: bool) -> dict[str, QuantizedWeight]:
    source = folder / "source"
    source.mkdir()
    out = folder / "out"
    out.mkdir()
    writer = CheckpointWriter(source, out)
    modules = {f"model.layers.{i}.mlp.up_proj": weight(bits, symmetric, group=group) for i, group in ((0, 32), (1, 16))}
    groups: dict[str, Grouping | None] = {n: Grouping(bits, w.group_size) for n, w in modules.items()}
    if method == "awq":  # one group size for all
        modules.popitem()
        groups["model.layers.1.mlp.up_proj"] = None
    for name, value in modules.items():
        writer.quantized(name, value, method)
    writer.tensor("model.norm.weight", torch.ones(64, dtype=torch.bfloat16))
    writer.close(
        {"model_type": "llama", "quantization_config": quantization_config(method, bits, 32, symmetric, groups)}
    )
    return modules


@pytest.mark.parametrize(("method", "bits", "symmetric"), CASES)
def test_a_checkpoint_gives_back_its_integers(tmp_path: Path, method: str, bits: int, symmetric: bool) -> None:
    modules = write(tmp_path, method, bits, symmetric)
    checkpoint = Checkpoint(tmp_path / "out")
    assert sorted(checkpoint.quantized) == sorted(modules)
    assert checkpoint.float_names == ["model.norm.weight"]
    assert realised_bits(checkpoint) == dict.fromkeys(modules, bits)
    for name, before in modules.items():
        after = checkpoint.quantized_weight(name)
        assert torch.equal(after.codes, before.codes)
        assert torch.equal(after.zero_point, before.zero_point)
        assert after.group_size == before.group_size
        assert checkpoint.linear_shape(name) == (16, 64)
        assert torch.equal(checkpoint.weight(f"{name}.weight"), before.dequantize())


def test_groups_that_do_not_divide_fall_back_by_layout() -> None:
    shapes = {"a": (64, 128), "b": (64, 96), "c": (64, 100), "d": (60, 128)}
    assert choose_groups(shapes, "awq", 4, 128) == {"a": Grouping(4, 128), "b": None, "c": None, "d": None}
    found = choose_groups(shapes, "gptq", 4, 128)
    assert found == {"a": Grouping(4, 128), "b": Grouping(4, 32), "c": None, "d": None}


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
    write(tmp_path, "gptq", 4, False)
    checkpoint = Checkpoint(tmp_path / "out")
    name = checkpoint.quantized[0]
    mixed = dict(checkpoint.tensors.items()) | {f"{name}.g_idx": torch.randperm(64).to(torch.int32) // 32}
    checkpoint.tensors = mixed  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="activation order"):
        checkpoint.quantized_weight(name)


def test_an_unknown_quantization_method_is_named(tmp_path: Path) -> None:
    write(tmp_path, "gptq", 4, False)
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
