"""Loading checkpoints for training: quantized ones equal their dequantized twins; faults are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.linear import QuantLinear
from olive.runtime.torch_model import load, load_tokenizer


def _copy(folder: Path, tmp_path: Path, **config: object) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if config:
        settings = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(settings))
    return copy


def _edit(folder: Path, drop: str = "", add: str = "") -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    save_file(tensors | ({add: torch.zeros(2)} if add else {}), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantized_model_equals_its_dequantized_twin(
    method: str, quantized_bases: dict[str, Path], float_base: Path
) -> None:
    folder = quantized_bases[method]
    model, twin = load(folder), load(float_base)
    checkpoint = Checkpoint(folder)
    twin.load_state_dict(
        {f"{name}.weight": checkpoint.weight(f"{name}.weight") for name in checkpoint.quantized}, strict=False
    )
    ids = torch.arange(24).view(2, 12)
    # Same weights; only the order of adding biases differs.
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == len(checkpoint.quantized) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 256
    assert not model.training


def test_unknown_architecture_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load this model.*nosuch.*trust_remote_code") as caught:
        load(_copy(base, tmp_path, model_type="nosuch"))
    assert caught.value.exit_code == 2


def test_missing_tensor_is_named(base: Path, tmp_path: Path) -> None:
    folder = _copy(base, tmp_path)
    _edit(folder, drop="model.norm.weight")
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is missing"):
        load(folder)


def test_tensor_without_a_place_is_named(quantized_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(quantized_bases["gptq"], tmp_path)
    _edit(folder, add="model.layers.9.extra")
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.9\.extra has no place in LlamaForCausalLM"):
        load(folder)


def test_buffers_that_earlier_versions_saved_are_passed_over(quantized_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(quantized_bases["gptq"], tmp_path)
    _edit(folder, add="model.layers.0.self_attn.rotary_emb.inv_freq")
    assert load(folder) is not None


@pytest.mark.parametrize(
    ("config", "said"), [({"num_hidden_layers": 1}, "has no place in"), ({"intermediate_size": 96}, "does not fit")]
)
def test_quantized_layer_that_does_not_fit_is_named(
    quantized_bases: dict[str, Path], tmp_path: Path, config: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"quantized layer model\.layers\.\d\..* {said}"):
        load(_copy(quantized_bases["awq"], tmp_path, **config))


def test_truncated_weights_are_named(base: Path, tmp_path: Path) -> None:
    folder = _copy(base, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"truncated: tensor"):
        load(folder)


def test_missing_tokenizer_is_named(float_base: Path, tmp_path: Path) -> None:
    folder = _copy(float_base, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in .*: neither tokenizer.json nor a vocabulary; copy"):
        load_tokenizer(folder)


def test_broken_tokenizer_is_named(float_base: Path, tmp_path: Path) -> None:
    folder = _copy(float_base, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer in .* that can be loaded"):
        load_tokenizer(folder)
