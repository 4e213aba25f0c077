"""The pass: from an ``hf`` model with adapters to an ``onnx`` one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from olive.model import Model, sha256
from olive.passes.base import Context
from olive.passes.decoder import Decoder
from olive.runtime.genai import Generator
from olive.target import Target


def context(folder: Path, facts: dict[str, Any], target: Target) -> Context:
    (folder / "out").mkdir()
    (folder / "scratch").mkdir()
    return Context(
        out=folder / "out",
        input_key="input",
        scratch=folder / "scratch",
        target=target,
        compute_device="cpu",
        seed=0,
        digest=sha256,
        note=lambda **found: facts.update(found),
        progress=lambda *step: facts.update(progress=step),
    )


def test_model_with_an_adapter(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "travel")
    facts: dict[str, Any] = {}
    source = Model("hf", tmp_path / "hf", {"travel": tmp_path / "travel"})
    made = Decoder(precision="int4").run(source, context(tmp_path, facts, Target()))
    assert made.kind == "onnx" and made.path == tmp_path / "out" / "model"
    assert made.adapters == {"travel": made.path / "adapter_weights.onnx_adapter"}
    assert facts["adapters"]["travel"]["rank"] == 4
    assert facts["progress"] == ("layers", 16, 16)
    assert Generator(made.path, made.adapters).generate("hi", adapter="travel", max_new_tokens=2).tokens
