"""The float32 graph computes what transformers computes, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from olive.decoder import rope
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.session import OnnxDecoder

BOUND = 1e-4
"""Float32 sums in another order differ by about 1e-5 at logits of about 5."""
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with llama3 rope": ("llama", {"rope_parameters": tiny.LLAMA3}),
    "llama with linear rope and biases": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral beyond its window": ("mistral", {"sliding_window": 16}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {}),
    "phi3 beyond its window": ("phi3", {"sliding_window": 16}),
    "phi3 with a part of the head rotated": (
        "phi3",
        {
            "hidden_size": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "qwen2 with biases, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window on its last layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2 with a window that is switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    "qwen3 with a head size of its own": ("qwen3", {"head_dim": 32}),
    "llama with yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                             "original_max_position_embeddings": 32}},
    ),
    "gemma2, beyond its window": ("gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 24}),
    "gemma2 without caps": (
        "gemma2", {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3, beyond its window": (
        "gemma3_text", {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 24},
    ),
    "gemma3 with a scaled global rope": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "smollm3 with layers that do not rotate": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3 with a window on them": (
        "smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 16},
    ),
    "smollm3 with windows by layer_types alone": (
        "smollm3",
        {"num_hidden_layers": 4, "sliding_window": 16, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 1.7},
    ),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"hidden_size": 256}),
    "stablelm with biases, in parallel": (
        "stablelm", {"hidden_size": 256, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    "starcoder2 without a window": ("starcoder2", {}),
    "starcoder2 beyond its window": ("starcoder2", {"sliding_window": 16}),
    "starcoder2 untied, without biases": (
        "starcoder2", {"tie_word_embeddings": False, "use_bias": False, "sliding_window": 16},
    ),
    "gpt_neox": ("gpt_neox", {"hidden_size": 256}),
    "gpt_neox, one after the other, without biases": (
        "gpt_neox", {"hidden_size": 256, "use_parallel_residual": False, "attention_bias": False},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 96}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("mixtral", {}),
    "mixtral beyond its window": ("mixtral", {"sliding_window": 16}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, weights as they come, one layer dense": (
        "qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "qwen3_moe with a window, on layers before max_window_layers too": (
        "qwen3_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
}  # fmt: skip


def expected(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny.checkpoint(tmp_path / "hf", family, **changes)
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    ids = tiny.ids(80)
    given = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy())
    assert np.abs(given - expected(model, ids)).max() < BOUND


PHI3_LONGROPE = {"type": "longrope", "short_factor": [1.0 + i for i in range(8)],
                 "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 32}  # fmt: skip
EDITED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral with windows by layer_types, as in Ministral 8B": (
        "mistral", {"sliding_window": 16}, {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3 with the original length among the rope's settings alone": (
        "phi3", {}, {"rope_parameters": None, "rope_scaling": PHI3_LONGROPE, "original_max_position_embeddings": None},
    ),
    "gemma3 as Google gives those that see, with few sizes": (
        "gemma3",
        {"text_config": tiny.SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}},
        {"text_config": {name: tiny.SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                             "vocab_size")}
         | {"model_type": "gemma3_text", "head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}},
    ),
}  # fmt: skip
"""Configs that transformers does not write itself: family, what makes the checkpoint, what is then changed in its file
(None: left out)."""


@pytest.mark.parametrize("case", EDITED)
def test_logits_where_config_json_says_it_another_way(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, made, changes = EDITED[case]
    tiny.checkpoint(tmp_path / "hf", family, **made)
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in changes or v is not None}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    ids = tiny.ids(80)
    given = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy())
    assert np.abs(given - expected(model.eval(), ids)).max() < BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_pair_that_is_stored_under_the_name_of_the_head(family: str, tmp_path: Path) -> None:
    """safetensors' own save_model keeps the first of two names."""
    model = tiny.checkpoint(tmp_path / "hf", family, tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop(
        "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
    )
    save_file(tensors, file, metadata={"format": "pt"})
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    ids = tiny.ids(20)
    given = OnnxDecoder(tmp_path / "onnx", 1).logits(ids.numpy())
    assert np.abs(given - expected(model, ids)).max() < BOUND


PHI35 = {  # the numbers of Phi-3.5-mini-instruct that decide on positions; 4 of its 32 heads
    "hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 320, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "sliding_window": 262144, "rms_norm_eps": 1e-5,
}  # fmt: skip
FACTORS = {
    "short_factor": [1.0 + 0.04 * i for i in range(48)],
    "long_factor": [1.0 + 1.3 * i for i in range(48)],
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_longrope_on_both_sides_of_the_original_length(spelling: str, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    model = tiny.checkpoint(tmp_path / "hf", "phi3", **PHI35, rope_parameters=rope)
    model.set_attn_implementation("sdpa")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if spelling == "rope_scaling":
        del config["rope_parameters"]
        config |= {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **FACTORS}}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    assert facts["notes"] == []
    decoder = OnnxDecoder(tmp_path / "onnx", 2)
    for tokens in (64, 4096, 4097, 4160):
        ids = tiny.ids(tokens, batch=1)
        with torch.no_grad():
            want = model(ids, logits_to_keep=64).logits.numpy()
        assert np.abs(decoder.logits(ids.numpy())[:, -64:] - want).max() < BOUND, tokens


def test_a_text_that_grows_past_the_switch_of_longrope(tmp_path: Path) -> None:
    """GenAI reads the text anew with the other table; from then on each token is that of the whole text."""
    from olive.runtime.genai import Generator

    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    model = tiny.checkpoint(tmp_path / "hf", "phi3", **PHI35, rope_parameters=rope)
    model.set_attn_implementation("sdpa")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options(context_length=8192))
    prompt = tiny.ids(4094, batch=1)[0].tolist()
    with Generator(tmp_path / "onnx") as generator:
        tokens = generator.generate(prompt, max_new_tokens=10).tokens
    assert len(tokens) == 10 or tokens[-1] in (1, 4)
    assert len(prompt) + len(tokens) > 4097
    for i, token in enumerate(tokens):
        with torch.no_grad():
            row = model(torch.tensor([prompt + tokens[:i]]), logits_to_keep=1).logits[0, -1]
        assert row.max() - row[token] < 2 * BOUND, i


@pytest.mark.parametrize("config", [{"short_mscale": 1.25, "long_mscale": 1.5}, {"attention_factor": 1.4}])
def test_longrope_scale_given_in_the_config(config: dict[str, float]) -> None:
    settings = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8} | config
    found = rope.read({"model_type": "phi3", "rope_scaling": settings, "max_position_embeddings": 64}, 16, original=32)
    assert found.table()[0][0, 0] == pytest.approx(config.get("short_mscale", 1.4))
    assert found.table(long=True)[0][0, 0] == pytest.approx(config.get("long_mscale", 1.4))


@pytest.mark.parametrize("name", ["llama-12m", "phi3-4m", "phi3-29m", "qwen3-12m"])
def test_trained_models(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the trained model {name} is not beside the repository")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    build(Checkpoint(folder), tmp_path, Options())
    ids = torch.randint(5, 8000, (1, 200), generator=torch.Generator().manual_seed(0))
    assert np.abs(OnnxDecoder(tmp_path, 1).logits(ids.numpy()) - expected(model, ids)).max() < BOUND
