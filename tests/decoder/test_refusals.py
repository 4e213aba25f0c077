"""What the builder does not honour, it refuses, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from olive.decoder import fallback
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not built; did you mean 'llama'.; families: gemma2, "),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported for llama; only silu, "),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope setting 'mrope_section'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_attention_heads": 2, "head_dim": 16}, "queries, keys and values have 128 channels"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+ has no place in the family llama"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\.self_attn\.q_proj\.weight is missing"),
        ({"vocab_size": None}, "vocab_size: required, but not given"),
        ({"vocab_size": 300}, r"embed_tokens\.weight is \[320, 64\], but config\.json says \[300, 64\]"),
        ({"hidden_size": 96, "head_dim": 16}, r"embed_tokens\.weight is \[320, 64\], .* says \[320, 96\]"),
        ({"model_type": "qwen2"}, r"q_proj\.bias is missing for the family qwen2"),
    ],
)
def test_config_that_is_not_honoured(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("family", "made", "changes", "message"),
    [
        ("gpt2", {"hidden_size": 48}, {}, "heads of 12 channels; ONNX Runtime takes multiples of 8"),
        ("gpt2", {}, {"n_positions": 512}, r"wpe\.weight has 256 rows, but the positions in config\.json need 512"),
        ("opt", tiny.DECODERS["opt"], {"max_position_embeddings": 512}, r"embed_positions\.weight has 258 .* need 514"),
        ("gemma3_text", tiny.DECODERS["gemma3_text"] | {"attn_logit_softcapping": 50.0}, {},
         "attn_logit_softcapping 50.0 is not supported for gemma3_text; only None"),
    ],
)  # fmt: skip
def test_what_one_family_does_not_take(
    family: str, made: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny.checkpoint(tmp_path / "hf", family, **made)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    assert not (tmp_path / "onnx").exists()


def test_a_checkpoint_without_tokenizer_json(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())


def test_an_architecture_that_nobody_builds(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    config = tiny.SIZES | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "hf" / "model.safetensors")
    tiny.tokenizer(tmp_path / "hf")
    message = r"architecture OlmoeForCausalLM is not supported; families: gemma2, (?s:.*)NotImplementedError"
    with pytest.raises(ConfigError, match=message):
        fallback.build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4"), tmp_path)


def test_the_fallback_refuses_what_would_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    monkeypatch.setattr(fallback, "available_memory", lambda **_: 1000)
    with pytest.raises(ConfigError, match=r"would need about .* GB of memory, and 0\.0 GB are free"):
        fallback.build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("int4"), tmp_path)


def test_the_fallback_builds_what_genai_knows(tmp_path: Path) -> None:
    """Llama is built here; it stands for a family that only GenAI's builder knows."""
    model = tiny.checkpoint(tmp_path / "hf", "llama")
    facts = fallback.build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options("fp32"), tmp_path)
    assert facts["engine"].startswith("genai ")
    ids = tiny.ids(20)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    assert np.abs(OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy()) - expected).max() < 1e-4
