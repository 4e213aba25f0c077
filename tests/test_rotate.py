"""Rotated checkpoints as other programs read them: the same logits from other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from olive.cache import Cache
from olive.engine import run
from olive.errors import ConfigError
from olive.plan import plan
from olive.quant.formats.checkpoint import Checkpoint
from olive.workflow import read_workflow


def rotate(source: Path, out: Path, cache: Path, seed: int = 0) -> Any:
    """Run the pass with the full verification."""
    work = {"input_model": {"path": str(source)}, "passes": [{"type": "rotate"}], "output_dir": str(out), "seed": seed}
    opened = Cache(cache)
    return run(plan(read_workflow(work), opened), opened)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tiny.ids(24), use_cache=False).logits


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "phi3": {},
    "qwen2": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},  # 96 = 3 * 32
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},  # 1 + weight, scaled and tied embeddings
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_computes_the_same(family: str, tmp_path: Path) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", family, **FAMILIES[family])
    report = rotate(tmp_path / "hf", tmp_path / "out", tmp_path / "cache")
    assert report.verification["kl_divergence"] < 1e-6
    wanted, found = logits(tmp_path / "hf"), logits(tmp_path / "out")
    assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max().item())
    facts = report.steps[0].facts
    assert list(facts["value_heads_rotated"].values()) == [True, True]
    before, after = Checkpoint(tmp_path / "hf"), Checkpoint(tmp_path / "out")
    tied = model.config.tie_word_embeddings
    assert facts["lm_head_untied"] == tied  # the final norm of a tiny model is not all ones
    assert ("lm_head.weight" in after.float_names) and after.config["tie_word_embeddings"] is False
    for name in before.float_names:
        if "q_norm" not in name and "k_norm" not in name and not name.endswith("bias"):
            assert not torch.allclose(after.weight(name), before.weight(name), atol=1e-3), name
    assert {after.weight(name).dtype for name in after.float_names} == {torch.float32}


def test_a_tied_head_stays_tied_where_the_final_norm_leaves_it_as_it_is(tmp_path: Path) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(1)
    model.save_pretrained(tmp_path / "hf")
    report = rotate(tmp_path / "hf", tmp_path / "out", tmp_path / "cache")
    assert report.steps[0].facts["lm_head_untied"] is False
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").float_names
    wanted = logits(tmp_path / "hf")
    assert torch.allclose(logits(tmp_path / "out"), wanted, atol=1e-4 * wanted.abs().max().item())


def test_the_seed_chooses_the_rotation(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    found = []
    for seed in (0, 1):
        rotate(tmp_path / "hf", tmp_path / str(seed), tmp_path / "cache", seed)
        found.append(Checkpoint(tmp_path / str(seed)).weight("model.embed_tokens.weight"))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, "embed_positions.weight reads or writes the residual"),
        ("gpt_neox", {}, "the norm is not an RMS norm"),
        ("gemma2", {"head_dim": 16}, "rotation is not possible, the layer would compute something else"),
        ("qwen3_moe", {}, "its norm post_attention_layernorm is not read by linear layers alone"),
        ("qwen2_5_vl", {}, "rotation is not possible"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused_with_the_reason(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tiny.checkpoint(tmp_path / "hf", family, **changes)
    with pytest.raises(ConfigError, match=reason):
        rotate(tmp_path / "hf", tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_outliers_of_the_stream_are_spread(tmp_path: Path) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", "llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 40
        for layer in model.model.layers:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                layer.get_submodule(name).weight[7] *= 40
    model.save_pretrained(tmp_path / "hf")
    rotate(tmp_path / "hf", tmp_path / "out", tmp_path / "cache")

    def largest_over_mean(folder: Path) -> float:
        table = Checkpoint(folder).weight("model.embed_tokens.weight").abs()
        return (table.amax(1) / table.mean(1)).mean().item()

    assert largest_over_mean(tmp_path / "out") < 0.25 * largest_over_mean(tmp_path / "hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
