"""genai_config.json: complete, and true of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import real_tokenizers

import tiny
from olive.cli import main
from olive.decoder import chat
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.decoder.tokenizer_files import Tokens
from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.genai import Generator


def built(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    tiny.checkpoint(folder / "hf", "llama")
    file = folder / "hf" / "config.json"
    changed = {k: v for k, v in (json.loads(file.read_text()) | config).items() if v is not None}
    file.write_text(json.dumps(changed))
    (folder / "hf" / "generation_config.json").write_text(json.dumps(generation))
    facts = build(Checkpoint(folder / "hf"), folder / "onnx", Options())
    Generator(folder / "onnx")
    return json.loads((folder / "onnx" / "genai_config.json").read_text()), facts["notes"]


def test_ends_are_merged_from_config_generation_and_the_chat_template(tmp_path: Path) -> None:
    made, notes = built(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [3, 2]})
    # 1 is the tokenizer's eos_token, 4 is <|end|>, with which the template ends a turn
    assert made["model"]["eos_token_id"] == [3, 2, 1, 4]
    assert notes == []


def test_ids_beyond_the_vocabulary_are_left_out_and_said(tmp_path: Path) -> None:
    made, notes = built(tmp_path, {"bos_token_id": 99999}, {"eos_token_id": [1, 128001], "pad_token_id": -1})
    assert made["model"]["eos_token_id"] == [1, 4]
    assert made["model"]["pad_token_id"] == 1 and "bos_token_id" not in made["model"]
    assert notes == [f"{name} {i} is left out: the model has ids below 320" for name, i in
                     (("eos_token_id", 128001), ("bos_token_id", 99999), ("pad_token_id", -1))]  # fmt: skip


def test_no_end_at_all_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", eos_token_id=4000)
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no eos_token_id that the model has, here, in generation_config"):
        build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())


def test_search_settings_are_the_makers_where_genai_takes_them(tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "early_stopping": "never",
             "repetition_penalty": 1.1, "max_length": 99999}  # fmt: skip
    made, _ = built(tmp_path, {}, given)
    search = made["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"]) == (True, 0.6, 0.9)
    assert (search["top_k"], search["early_stopping"], search["repetition_penalty"]) == (50, True, 1.1)
    assert search["max_length"] == 256  # what the model has
    assert "sliding_window" not in made["model"]["decoder"]


def test_answers_are_not_sampled_where_the_makers_say_nothing(tmp_path: Path) -> None:
    made, _ = built(tmp_path, {}, {})
    assert made["search"]["do_sample"] is False


def test_tokens_without_embeddings_are_said(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    largest = real_tokenizers.save("gpt2", tmp_path / "hf", chat_template=chat_templates.ALWAYS_OPEN) - 1
    facts = build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    (note,) = facts["notes"]
    assert note.startswith(f"tokenizer.json has ids up to {largest}, the model only 320 embeddings: a text with such ")


@pytest.mark.parametrize("kind", chat_templates.BY_KIND)
def test_the_end_of_a_turn_is_read_off_the_template(kind: str, tmp_path: Path) -> None:
    real_tokenizers.save(kind, tmp_path)
    tokens = Tokens.read(tmp_path)
    found = chat.end_of_turn(chat_templates.BY_KIND[kind], tokens.named, tokens.added)
    assert found == tokens.added.get(chat_templates.ENDS.get(kind, ""))


def test_what_opens_a_turn_ends_none() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}<|a|>{% else %}{{ m.content }}{% endif %}"
    )
    source += "{% endfor %}{% if messages[-1].role == 'assistant' %}<|a|>{% endif %}"
    assert chat.end_of_turn(source, {}, {"<|u|>": 1, "<|a|>": 2}) is None


@pytest.mark.usefixtures("cache")
def test_a_model_that_genai_would_read_otherwise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    size = real_tokenizers.save("mistral", tmp_path / "hf", chat_template=chat_templates.MISTRAL)
    files = {name: (tmp_path / "hf" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    tiny.checkpoint(tmp_path / "hf", "mistral", vocab_size=size, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    for name, content in files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    argv = ["auto-opt", "-m", str(tmp_path / "hf"), "-o", str(tmp_path / "onnx")]
    assert main(argv) == 3
    said = capsys.readouterr().err
    assert "decoder: tokenizer.json: GenAI reads 2 of 10 texts otherwise than tokenizer.json, the first" in said
    assert "--verify_tokenizer any accepts that" in said
    assert not (tmp_path / "onnx").exists()
    assert main([*argv, "--verify_tokenizer", "any"]) == 0
    report = json.loads((tmp_path / "onnx.report.json").read_text())
    assert report["verification"]["tokenizer"]["reads_as_its_file"] is False
