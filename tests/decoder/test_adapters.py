"""Adapters as optional inputs: the same as PEFT, convertible without a rebuild, refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from olive.decoder import lora, peft
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime import adapters
from olive.runtime.session import OnnxDecoder

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAST = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def train(folder: Path, base: Path, targets: Sequence[str], rank: int, **changes: Any) -> torch.nn.Module:
    """Save an adapter with random weights; return the PEFT model, which keeps its own copy of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | changes
    torch.manual_seed(rank)
    tuned = get_peft_model(model, LoraConfig(**options)).eval()
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.2 / rank**0.5)
    tuned.save_pretrained(folder)
    return tuned


def logits(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.numpy()


CASES: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "unpacked checkpoint": ("llama", ALL, {}),
    "packed checkpoint": ("phi3", PHI, {}),
    "norms between": ("qwen3", ["q_proj", "v_proj"], {}),
    "k alone": ("qwen2", ["k_proj"], {}),
    "rank stabilized": ("llama", ALL, {"use_rslora": True}),
    "patterns": (
        "llama",
        ALL,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 8},
            "alpha_pattern": {"v_proj": 3, r".*\.1\.mlp\.down_proj": 5},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [4, 16])
def test_logits_are_those_of_peft(case: str, rank: int, tmp_path: Path) -> None:
    family, targets, changes = CASES[case]
    base = tiny.checkpoint(tmp_path / "hf", family)
    tuned = train(tmp_path / "adapter", tmp_path / "hf", targets, rank, **changes)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "adapter"])
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    lora.convert(tmp_path / "adapter", tmp_path / "onnx", tmp_path / "a.onnx_adapter")
    decoder, ids = OnnxDecoder(tmp_path / "onnx", 1), tiny.ids(30)
    plain, adapted = logits(base, ids), logits(tuned, ids)
    assert np.abs(plain - adapted).max() > 0.1
    assert np.abs(decoder.logits(ids.numpy()) - plain).max() < 1e-4
    assert np.abs(decoder.logits(ids.numpy(), tmp_path / "a.onnx_adapter") - adapted).max() < 1e-3


def test_further_adapters_need_no_rebuild(tmp_path: Path) -> None:
    """Another rank, fewer targets and a part of a packed module all fit."""
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "first", tmp_path / "hf", ALL, 16)
    tuned = train(tmp_path / "second", tmp_path / "hf", ["v_proj", "down_proj"], 4)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "first"])
    shapes = lora.convert(tmp_path / "second", tmp_path / "onnx", tmp_path / "b.onnx_adapter").facts()["shapes"]
    assert shapes["model.layers.1.self_attn.qkv_proj.lora_A.weight"] == [64, 4]
    assert shapes["model.layers.1.self_attn.qkv_proj.lora_B.weight"] == [4, 128]
    ids = tiny.ids(30)
    given = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy(), tmp_path / "b.onnx_adapter")
    assert np.abs(given - logits(tuned, ids)).max() < 1e-3


def test_inputs_are_named_after_the_checkpoint_and_listed_once(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "phi3")
    train(tmp_path / "a", tmp_path / "hf", ["qkv_proj"], 4)
    train(tmp_path / "b", tmp_path / "hf", ["down_proj"], 4)
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "a", tmp_path / "b"], "abc")
    modules = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.qkv_proj")]
    assert facts["adapted"] == sorted(modules)
    graph = adapters.read_graph(tmp_path / "onnx")
    assert graph.inputs[f"{modules[0]}.lora_A.weight"].shape == (128, None)
    assert list(graph.layout["packed"]) == [modules[1], modules[3]]
    assert graph.base == "abc"
    inputs = [i.name for i in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.input]
    assert len(inputs) == len(set(inputs)) == 2 + 4 + 8


def test_a_misfit_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    tiny.checkpoint(tmp_path / "wide", "llama", intermediate_size=192)
    train(tmp_path / "a", tmp_path / "hf", ["q_proj", "down_proj"], 4)
    train(tmp_path / "b", tmp_path / "wide", ["q_proj", "down_proj"], 4)
    train(tmp_path / "c", tmp_path / "hf", ["o_proj"], 4)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "a"])
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    with pytest.raises(ConfigError, match=rf"{name} has shape \[192, 4\], expected \[128, R\]; build onnx again"):
        lora.convert(tmp_path / "b", tmp_path / "onnx", tmp_path / "b.onnx_adapter")
    name = "model.layers.0.self_attn.o_proj.lora_A.weight"
    with pytest.raises(ConfigError, match=rf"no input {name} \[64, 4\] \(it has 8 adapter inputs\)"):
        lora.convert(tmp_path / "c", tmp_path / "onnx", tmp_path / "c.onnx_adapter")
    assert not list(tmp_path.glob("*.onnx_adapter"))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj"], 4)
    manifest = {"format": "olive", "base_digest": "1" * 64}
    (tmp_path / "a" / "olive.json").write_text(json.dumps(manifest))
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "a"], "2" * 64)
    with pytest.raises(ConfigError, match=r"trained on another base than .*111111, expected 2222"):
        lora.convert(tmp_path / "a", tmp_path / "onnx", tmp_path / "a.onnx_adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    ],
)
def test_what_is_not_plain_lora_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj"], 4)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        peft.read_peft(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected a JSON object, got list"),
        ({"lora_alpha": "much"}, "lora_alpha of model.layers.0.self_attn.q_proj: expected a number, got 'much'"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '\\(' is not a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected an object, got list"),
    ],
)
def test_a_broken_configuration_is_named(config: Any, message: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj"], 4)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config if isinstance(config, dict) else config))
    with pytest.raises(ConfigError, match=message):
        peft.read_peft(tmp_path / "a")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda _: {}, "holds no tensors"),
        (lambda own: own | {LAST: own[LAST] * torch.nan}, "layers.1.self_attn.q_proj: holds NaN or infinity"),
        (lambda own: own | {LAST: own[LAST][:, 1:]}, r"lora_A \[4, 64\] and lora_B \[64, 3\] do not fit each other"),
        (lambda own: {n.removeprefix("base_model.model."): t for n, t in own.items()}, "not named as PEFT does"),
        (lambda own: {n.replace(".weight", ".default.weight"): t for n, t in own.items()}, "not named as PEFT does"),
    ],
)
def test_broken_tensors_are_refused(broken: Any, message: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj"], 4)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in broken(load_file(file)).items()}, file)
    with pytest.raises(ConfigError, match=message):
        peft.read_peft(tmp_path / "a")


def test_an_adapter_beyond_float16_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj"], 4, lora_alpha=10**7)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(adapter_precision="fp16"), [tmp_path / "a"])
    with pytest.raises(ConfigError, match=r"qkv_proj\.lora_B\.weight is too large for float16"):
        lora.convert(tmp_path / "a", tmp_path / "onnx", tmp_path / "a.onnx_adapter")


def test_lora_on_lm_head_names_the_tensor(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    train(tmp_path / "a", tmp_path / "hf", ["q_proj", "lm_head"], 4)
    with pytest.raises(ConfigError, match=r"tensor base_model\.model\.lm_head\.\S+: only LoRA on linears"):
        peft.read_peft(tmp_path / "a")


def test_an_adapter_of_another_family_is_refused_before_building(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "phi3")
    tiny.checkpoint(tmp_path / "other", "gpt2")
    train(tmp_path / "a", tmp_path / "other", ["c_attn"], 4, fan_in_fan_out=True)
    with pytest.raises(ConfigError, match=r"adapts transformer\.h\.0\.attn\.c_attn, which the base does not have"):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(), [tmp_path / "a"])
    assert not (tmp_path / "onnx").exists()
