"""A tiny random model as checkpoint and as ONNX folder, with an adapter of both forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import Pair

import tiny
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.model import Model
from olive.quant.formats.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("pair")
    tuned = get_peft_model(tiny.checkpoint(folder / "hf", "llama"), LoraConfig(r=4, target_modules=["v_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0, 0.2)
    tuned.save_pretrained(folder / "peft")
    build(Checkpoint(folder / "hf"), folder / "onnx", Options(), [folder / "peft"])
    lora.convert(folder / "peft", folder / "onnx", folder / "onnx" / "own.onnx_adapter")
    return Pair(
        Model("hf", folder / "hf"), Model("onnx", folder / "onnx"), folder / "peft",
        folder / "onnx" / "own.onnx_adapter",
    )  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with 450 bytes, which are as many tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 9)
    return file
