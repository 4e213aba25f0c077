"""Models that also see: their text decoder is quantized, everything else is copied as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from olive.cli import main
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.linear import QuantLinear
from olive.runtime.layers import LayeredModel, auto_class, decoder_layers, decoder_linears, skeleton
from olive.runtime.tensors import open_tensors
from olive.runtime.torch_model import load

IMAGE = 300
TOKENS = 4


def picture(family: str) -> dict[str, Any]:
    """Return a model's inputs: text around the four tokens of one random image."""
    random = torch.Generator().manual_seed(0)
    ids = tiny.ids(12, batch=1)
    ids[0, 3 : 3 + TOKENS] = IMAGE
    if not family.startswith("qwen"):
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=random)}
    channels = 2 * 3 * 14 * 14  # two frames of a patch; 2 x 2 patches make a token
    ids[0, 2] = 302
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(4 * TOKENS, channels, generator=random),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
def test_the_text_decoder_is_streamed_under_the_names_of_the_model(family: str, fused: bool, tmp_path: Path) -> None:
    expected = tiny.checkpoint(tmp_path, family, fused=fused)
    model = skeleton(tmp_path)
    prefix, layers = decoder_layers(model)
    assert prefix == "model.language_model.layers"  # of two, while the vision tower has three
    assert len(layers) == 2
    tensors = open_tensors(tmp_path, model)
    assert isinstance(tensors, Checkpoint)
    state = expected.state_dict()
    for name in tensors.float_names:
        assert torch.equal(tensors.weight(name), state[name])
    layered = LayeredModel(tensors, model, dtype=torch.float32, devices=["cpu"])
    batch = layered.start(tiny.ids(20), 2)[0]
    for index, _, block in layered.layers():
        layered.advance(index, block, [batch])
    with torch.no_grad():
        torch.testing.assert_close(layered.logits(batch), expected(tiny.ids(20)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("family", "algorithm"),
    [("qwen2_5_vl", "rtn"), ("qwen2_5_vl", "awq"), ("llava", "gptq"), ("gemma3", "awq"), ("qwen3_vl_moe", "gptq")],
)
def test_what_sees_is_copied_bit_for_bit(family: str, algorithm: str, tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "hf", family)
    argv = ["quantize", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "q"), "--algorithm", algorithm]
    if algorithm != "rtn":
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog, and then it rests a while. " * 60)
        argv += ["-d", "text", "--data_files", str(text)]
    assert main([*argv, "--group_size", "32", "--max_kl", "0.4"]) == 0
    checkpoint = Checkpoint(tmp_path / "q")
    assert set(checkpoint.quantized) == set(decoder_linears(skeleton(tmp_path / "hf")))
    state = source.state_dict()
    outside = [name for name in checkpoint.float_names if not name.startswith("model.language_model.layers.")]
    seeing = {name.split(".")[1] for name in outside if name.startswith("model.")} - {"language_model"}
    assert seeing  # a tower, and with some a projector
    for name in outside:
        assert torch.equal(checkpoint.weight(name), state[name])
    assert main(["dequantize", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "f"), "--max_kl", "1e-5"]) == 0
    packed, plain = load(tmp_path / "q"), load(tmp_path / "f")
    assert type(packed) is type(source)
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == len(checkpoint.quantized)
    blind = {"input_ids": picture(family)["input_ids"]}
    with torch.no_grad():
        seen = packed(**picture(family)).logits
        torch.testing.assert_close(seen, plain(**picture(family)).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen, packed(**blind).logits, atol=1e-2)  # the image matters


@pytest.mark.parametrize(
    ("architectures", "sees"),
    [(None, True), (["Qwen3_5ForConditionalGeneration"], True), (["Qwen3_5ForCausalLM"], False)],
)
def test_one_configuration_may_serve_a_model_with_and_without_eyes(architectures: list[str] | None, sees: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model("qwen3_5", architectures=architectures)
    assert auto_class(config) is (AutoModelForImageTextToText if sees else AutoModelForCausalLM)


def test_without_a_decoder_of_its_own_a_model_is_searched_whole() -> None:
    class Layer(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(experts))

    model = nn.ModuleDict({"blocks": nn.ModuleList([Layer(5), Layer(5)])})
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == ("blocks", 2)  # not the longer lists of experts inside
