"""Adapters of other tools: other names in front, linears packed otherwise than in the base.

Expected is a checkpoint whose weights were changed by hand, with the update that the adapter's tensors stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.merge import Merged
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder

ALL = slice(None)
Place = tuple[str, slice, slice]
"""A parameter of the model, its rows, and the rows of the update [N, K] that belong there."""


@dataclass(frozen=True)
class Case:
    """An adapter's modules, and what each changes."""

    family: str
    places: Mapping[str, list[Place]]
    ranks: Mapping[str, int] = field(default_factory=dict)


def whole(parameter: str) -> list[Place]:
    return [(parameter, ALL, ALL)]


LAYER = "model.layers.1."
CASES = {
    f"under {prefix or 'nothing'}": Case(
        "llama",
        {f"{prefix}layers.1.{m}": whole(f"model.layers.1.{m}") for m in ("self_attn.o_proj", "mlp.down_proj")},
    )
    for prefix in ("model.", "", "model.language_model.", "language_model.model.", "language_model.")
} | {
    "GPT-NeoX without a head, by head": Case(
        "gpt_neox",
        {"layers.1.attention.query_key_value": whole("gpt_neox.layers.1.attention.query_key_value"),
         "layers.0.mlp.dense_h_to_4h": whole("gpt_neox.layers.0.mlp.dense_h_to_4h")},
    ),
    "GPT-2 without a head, transposed": Case("gpt2", {"h.1.attn.c_attn": whole("transformer.h.1.attn.c_attn")}),
    "OPT without a head": Case(
        "opt", {"decoder.layers.1.self_attn.k_proj": whole("model.decoder.layers.1.self_attn.k_proj")}
    ),
    "parts on a packed base": Case(
        "phi3",
        {f"{LAYER}self_attn.q_proj": [(f"{LAYER}self_attn.qkv_proj", slice(0, 64), ALL)],
         f"{LAYER}self_attn.k_proj": [(f"{LAYER}self_attn.qkv_proj", slice(64, 96), ALL)],
         f"{LAYER}self_attn.v_proj": [(f"{LAYER}self_attn.qkv_proj", slice(96, 128), ALL)],
         f"{LAYER}mlp.gate_proj": [(f"{LAYER}mlp.gate_up_proj", slice(0, 128), ALL)],
         f"{LAYER}mlp.up_proj": [(f"{LAYER}mlp.gate_up_proj", slice(128, 256), ALL)]},
        {"k_proj": 2, "up_proj": 8},
    ),
    "one part on a packed base": Case(
        "phi3", {f"{LAYER}self_attn.v_proj": [(f"{LAYER}self_attn.qkv_proj", slice(96, 128), ALL)]}
    ),
    "packed on a base in parts": Case(
        "llama",
        {f"{LAYER}self_attn.qkv_proj": [(f"{LAYER}self_attn.q_proj", ALL, slice(0, 64)),
                                        (f"{LAYER}self_attn.k_proj", ALL, slice(64, 96)),
                                        (f"{LAYER}self_attn.v_proj", ALL, slice(96, 128))],
         f"{LAYER}mlp.gate_up_proj": [(f"{LAYER}mlp.gate_proj", ALL, slice(0, 128)),
                                      (f"{LAYER}mlp.up_proj", ALL, slice(128, 256))]},
        {"mlp.gate_up_proj": 6},
    ),
}  # fmt: skip


def write(folder: Path, tensors: Mapping[str, tuple[Tensor, Tensor]], **config: Any) -> None:
    """Write a PEFT folder with A [R, K] and B [N, R] of each module."""
    folder.mkdir()
    named = {f"base_model.model.{m}.lora_{which}.weight": tensor
             for m, pair in tensors.items() for which, tensor in zip("AB", pair, strict=True)}  # fmt: skip
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config))


def logits(model: torch.nn.Module, ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_changes_what_its_tensors_say(name: str, tmp_path: Path) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    model = tiny.checkpoint(tmp_path / "hf", case.family, **tiny.DECODERS[case.family])
    parameters, ids = dict(model.named_parameters()), tiny.ids(20)
    before = logits(model, ids)
    tensors = {}
    for module, places in case.places.items():
        rank = next((r for pattern, r in case.ranks.items() if module.endswith(pattern)), 4)
        k = parameters[f"{places[0][0]}.weight"].shape[0 if case.family == "gpt2" else 1]
        n = sum(_rows(parameters, case.family, place) for place in places)
        tensors[module] = (torch.randn(rank, k, generator=generator) / k**0.5,
                           torch.randn(n, rank, generator=generator))  # fmt: skip
        update = tensors[module][1] @ tensors[module][0] * (6 / rank)  # [N, K], times alpha / rank
        for parameter, own, given in places:
            with torch.no_grad():
                weight = parameters[f"{parameter}.weight"]
                (weight.t() if case.family == "gpt2" else weight)[own] += update[given]
    write(tmp_path / "adapter", tensors, rank_pattern=dict(case.ranks))
    after = logits(model, ids)
    assert np.abs(after - before).max() > 0.1

    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "adapter"])
    assert facts["adapted"]
    lora.convert(tmp_path / "adapter", tmp_path / "onnx", tmp_path / "a.onnx_adapter")
    decoder = OnnxDecoder(tmp_path / "onnx", 1)
    assert np.abs(decoder.logits(ids.numpy()) - before).max() < 1e-3
    assert np.abs(decoder.logits(ids.numpy(), tmp_path / "a.onnx_adapter") - after).max() < 1e-3

    merged = Merged(Checkpoint(tmp_path / "hf"), tmp_path / "adapter")  # what verification compares with
    for parameter in (place[0] for places in case.places.values() for place in places):
        torch.testing.assert_close(merged.weight(f"{parameter}.weight"), parameters[f"{parameter}.weight"].data)


def _rows(parameters: Mapping[str, Tensor], family: str, place: Place) -> int:
    n = parameters[f"{place[0]}.weight"].shape[1 if family == "gpt2" else 0]
    return len(range(n)[place[1]])


def test_other_tensors_of_a_merged_checkpoint_stay(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    write(tmp_path / "adapter", {f"{LAYER}self_attn.o_proj": (torch.ones(4, 64), torch.ones(64, 4))})
    merged = Merged(Checkpoint(tmp_path / "hf"), tmp_path / "adapter")
    for name, weight in model.named_parameters():
        if name != f"{LAYER}self_attn.o_proj.weight":
            assert torch.equal(merged.weight(name), weight)


def test_a_part_of_another_width_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "phi3")
    write(tmp_path / "first", {f"{LAYER}self_attn.qkv_proj": (torch.ones(4, 64), torch.ones(128, 4))})
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "first"])
    write(tmp_path / "wide", {f"{LAYER}self_attn.k_proj": (torch.ones(4, 64), torch.ones(64, 4))})
    with pytest.raises(ConfigError, match=r"/wide: .*\.k_proj\.lora_B\.weight has 64 out channels, expected 32; give"):
        lora.convert(tmp_path / "wide", tmp_path / "onnx", tmp_path / "a.onnx_adapter")


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("qwen3_moe", "mlp.gate"),
        ("qwen3_moe", "mlp.experts.3.gate_proj"),
        ("mixtral", "block_sparse_moe.gate"),
        ("mixtral", "mlp.gate"),
        ("mixtral", "block_sparse_moe.experts.5.w2"),
    ],
)
def test_adapters_on_experts_and_routers_are_refused_by_name(family: str, module: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", family, **tiny.DECODERS[family])
    names = (f"model.layers.1.{module}", "model.layers.1.self_attn.o_proj")
    write(tmp_path / "adapter", {name: (torch.ones(4, 64), torch.ones(64, 4)) for name in names})
    message = re.escape(f"adapts model.layers.1.{module}: adapters on experts or their router are not supported")
    with pytest.raises(ConfigError, match=message):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "adapter"])
