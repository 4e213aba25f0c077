"""A tiny Llama with a tokenizer, float and quantized, and rows to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from olive.quant.affine import round_to_nearest
from olive.quant.formats import FORMATS
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.layout import Grouping
from olive.quant.formats.shards import ShardWriter


@pytest.fixture(scope="session")
def float_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256, attention_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def quantize_folder(source: Path, folder: Path, method: str) -> Path:
    """Write ``source`` with its projections rounded to 4 bits in groups of 32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint, writer, modules = Checkpoint(source), ShardWriter(folder), {}
    for name in checkpoint.float_names:
        tensor = checkpoint.tensors[name]
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            modules[module] = Grouping(4, 32)
            rounded = round_to_nearest(tensor, 4, 32, symmetric=False)
            for part, value in FORMATS[method].pack(rounded).items():
                writer.add(f"{module}.{part}", value)
        else:
            writer.add(name, tensor)
    writer.close()
    config = checkpoint.config | {"quantization_config": FORMATS[method].settings(4, 32, False, modules)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def quantized_bases(float_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {method: quantize_folder(float_base, root / method, method) for method in FORMATS}


@pytest.fixture(params=["float", "awq", "gptq"])
def base(request: pytest.FixtureRequest, float_base: Path, quantized_bases: dict[str, Path]) -> Path:
    return ({"float": float_base} | quantized_bases)[request.param]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"q": f"say {word} {i}", "a": f"{word}!"} for i in range(10) for word in ("yes", "no", "maybe")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
