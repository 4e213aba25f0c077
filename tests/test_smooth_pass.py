"""Smoothed checkpoints as other programs read them: the same logits, from activations without outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from olive.cache import Cache
from olive.engine import run
from olive.errors import ConfigError, PassError
from olive.plan import plan
from olive.quant.formats.checkpoint import Checkpoint
from olive.report import Report
from olive.workflow import read_workflow
from places import TEMPLATE, TRAVEL

ROWS = {"name": "json", "files": [str(TRAVEL)], "text_template": TEMPLATE, "max_samples": 8, "max_seq_len": 48}


def smooth(source: Path, out: Path, *more: dict[str, Any], **options: Any) -> Report:
    """Run the pass with the full verification, and others after it."""
    steps = [{"type": "smooth", "data": ROWS} | options, *more]
    work = {"input_model": {"path": str(source)}, "passes": steps, "output_dir": str(out)}
    cache = Cache(out.with_name(out.name + ".cache"))
    return run(plan(read_workflow(work), cache), cache)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(24), use_cache=False).logits


def largest_inputs(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Return each linear's largest input magnitudes by channel, [K], on some tokens."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].detach().abs().flatten(0, -2).amax(0)})
        )
    logits(model)
    return found


def with_outliers(folder: Path, family: str, **changes: Any) -> None:
    """Save a model in which a channel of each linear's input is far larger than the others, as in large models."""
    model: Any = tiny.checkpoint(folder, family, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[7] = 40
            layer.post_attention_layernorm.weight[9] = 40
    model.save_pretrained(folder)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # grouped queries: v takes one scale for two heads of o
    "phi3": {"tie_word_embeddings": True},  # packed qkv and gate_up
    "qwen2": {},  # biases
    "gemma": {"head_dim": 16},  # 1 + weight
    "qwen3_moe": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_computes_the_same(family: str, tmp_path: Path) -> None:
    with_outliers(tmp_path / "hf", family, **FAMILIES[family])
    report = smooth(tmp_path / "hf", tmp_path / "out")
    assert report.verification["kl_divergence"] < 1e-6
    wanted, found = logits(loaded(tmp_path / "hf")), logits(loaded(tmp_path / "out"))
    assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max().item())
    before, after = Checkpoint(tmp_path / "hf"), Checkpoint(tmp_path / "out")
    changed = {n for n in before.float_names if not torch.equal(before.weight(n), after.weight(n))}
    assert {n.split(".")[2] for n in changed} == {"0", "1"}  # of every layer, nothing outside
    assert any("down_proj" in n for n in changed) and any("o_proj" in n for n in changed)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_outliers_shrink(alpha: float, tmp_path: Path) -> None:
    with_outliers(tmp_path / "hf", "llama")
    report = smooth(tmp_path / "hf", tmp_path / "out", alpha=alpha)
    readers = {"self_attn.q_proj": 7, "mlp.up_proj": 9}
    names = [f"model.layers.{i}.{name}" for i in (0, 1) for name in readers]
    before, after = (largest_inputs(loaded(tmp_path / part), names) for part in ("hf", "out"))
    facts = report.steps[0].facts["largest_over_mean"]
    for name in names:
        outlier = readers[name.split(".", 3)[3]]
        assert before[name].argmax() == outlier
        assert after[name][outlier] < 0.3 * before[name][outlier]
        assert after[name].max() / after[name].mean() < 0.5 * before[name].max() / before[name].mean()
        if alpha == 1:  # on the calibration rows every channel now reaches 1, but for what the shared scales even out
            first = name.replace("up_proj", "gate_proj")
            assert facts[first]["before"] > 5
            assert facts[first]["after"] == pytest.approx(1, abs=0.01)


def test_what_was_scaled_is_float32_and_the_rest_as_it_was_stored(tmp_path: Path) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", "qwen3", head_dim=32)
    model.bfloat16().save_pretrained(tmp_path / "hf")
    smooth(tmp_path / "hf", tmp_path / "out")
    source, found = Checkpoint(tmp_path / "hf"), Checkpoint(tmp_path / "out")
    for name in source.float_names:
        same = "layers" not in name or "q_norm" in name or "k_norm" in name
        assert found.stored_dtype(name) == (torch.bfloat16 if same else torch.float32), name
        assert torch.equal(found.weight(name), source.weight(name).to(found.stored_dtype(name))) == same, name
    assert found.config["dtype"] == "float32"
    wanted = logits(loaded(tmp_path / "hf"))
    assert torch.allclose(logits(loaded(tmp_path / "out")), wanted, atol=1e-4 * wanted.abs().max().item())


def test_a_quantizer_follows(tmp_path: Path) -> None:
    with_outliers(tmp_path / "hf", "llama")
    report = smooth(tmp_path / "hf", tmp_path / "out", {"type": "rtn", "bits": 8, "group_size": 32})
    assert [step.name for step in report.steps] == ["smooth", "rtn"]
    smooth(tmp_path / "hf", tmp_path / "smoothed")
    quantized, smoothed = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "smoothed")
    name = "model.layers.1.mlp.down_proj"
    weight, integers = smoothed.weight(f"{name}.weight"), quantized.quantized_weight(name)
    steps = integers.scale.float().repeat_interleave(32, dim=1)
    # Half a step, and what float16 rounds off the scale times up to 255 steps.
    assert ((integers.dequantize() - weight).abs() <= 0.65 * steps.abs()).all()


def test_what_cannot_be_smoothed_is_refused(tmp_path: Path) -> None:
    model: Any = tiny.checkpoint(tmp_path / "hf", "llama")
    with pytest.raises(ConfigError, match="alpha"):
        smooth(tmp_path / "hf", tmp_path / "out", alpha=1.5)
    model.model.layers[0].mlp.up_proj.weight.data[:4] = 3e38
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(PassError, match="NaN or infinity on the calibration data"):
        smooth(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
