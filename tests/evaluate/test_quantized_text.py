"""A quantized trained model in ONNX, products with int8 activations, beside its dequantized checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from olive.cli import main
from olive.data.rows import heldout_text
from olive.evaluate.evaluators import Measuring, measured
from olive.evaluate.text import TextQuality
from olive.model import open_model
from places import LAB_MODEL

pytestmark = pytest.mark.usefixtures("cache")


def test_perplexity_is_within_half_a_percent_of_transformers(tmp_path: Path) -> None:
    """Half a percent is what int8 activations may cost; the checkpoint itself must agree to float32's precision."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quick = ["--verify", "files", "--no_cache"]
    for command, source, out in (("quantize", LAB_MODEL, "q"), ("dequantize", "q", "f"), ("auto-opt", "q", "onnx")):
        assert main([command, "-m", str(tmp_path / source), "-o", str(tmp_path / out), *quick]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "f")
    ids = tokenizer(heldout_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.double() for row in rows]
    wanted = float(torch.stack(losses).mean().exp())
    asked = TextQuality(compare=False)
    found = {name: measured(asked, open_model(tmp_path / name), Measuring())["perplexity"] for name in ("q", "onnx")}
    assert found["q"] == pytest.approx(wanted, rel=1e-5)
    assert found["onnx"] == pytest.approx(wanted, rel=5e-3)
    assert found["onnx"] != pytest.approx(wanted, rel=1e-6)  # so that int8 activations are what is measured
