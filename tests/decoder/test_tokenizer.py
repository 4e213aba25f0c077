"""GenAI reads text as tokenizer.json says, or it is said where not; what GenAI would not load is mended in the copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import real_tokenizers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from olive.decoder import tokenizer
from olive.decoder.tokenizer_files import Tokens, copy
from olive.errors import VerifyError

GENAI = {
    "model": {"type": "llama", "vocab_size": 9000, "context_length": 64, "eos_token_id": 1, "pad_token_id": 1,
              "decoder": {}},
    "search": {},
}  # fmt: skip


def copied(folder: Path) -> tuple[Path, list[str]]:
    out = folder / "out"
    out.mkdir()
    notes = copy(folder / "hf", out, Tokens.read(folder / "hf"))
    (out / "genai_config.json").write_text(json.dumps(GENAI))
    assert (out / "tokenizer.json").read_bytes() == (folder / "hf" / "tokenizer.json").read_bytes()
    return out, notes


def compared(folder: Path) -> tuple[tokenizer.Comparison, list[str]]:
    out, notes = copied(folder)
    return tokenizer.compare(AutoTokenizer.from_pretrained(folder / "hf"), out), notes


def config(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    return found


BOS = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "mistral": "<s>", "gemma2": "<bos>", "opt": "</s>"}
"""Of the kinds whose tokenizer.json puts one in front."""
RARELY = {"qwen2": "GenAI reads 1 of", "gpt_neox": "GenAI reads 1 of", "mistral": "GenAI reads 4 of",
          "llama2": "transformers reads"}  # fmt: skip
"""GenAI does not compose characters (NFC), and puts a space where Metaspace puts none; transformers 5 puts Metaspace in
place of Llama 2's normalizers."""


@pytest.mark.parametrize("kind", real_tokenizers.KINDS)
def test_every_real_kind_is_read_as_its_file_says(kind: str, tmp_path: Path) -> None:
    real_tokenizers.save(kind, tmp_path / "hf")
    found, _ = compared(tmp_path)
    assert found.differences == []
    expected = [RARELY[kind]] if kind in RARELY else []
    expected += [f"transformers puts {BOS[kind]} around a text, GenAI only with"] if kind in BOS else []
    assert len(found.notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(found.notes, expected, strict=True))


@pytest.mark.parametrize("kind", real_tokenizers.KINDS)
def test_special_tokens_in_genai_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    real_tokenizers.save(kind, tmp_path / "hf")
    out, _ = copied(tmp_path)
    genai = tokenizer.load(out)
    genai.update_options(add_special_tokens="true")
    assert list(genai.encode("hello")) == Tokenizer.from_file(str(out / "tokenizer.json")).encode("hello").ids


@pytest.mark.parametrize("kind", chat_templates.BY_KIND)
def test_a_conversation_is_rendered_and_read_as_in_transformers(kind: str, tmp_path: Path) -> None:
    real_tokenizers.save(kind, tmp_path / "hf", chat_template=chat_templates.BY_KIND[kind])
    found, notes = compared(tmp_path)
    assert not [note for note in found.notes if "template otherwise" in note or "cannot render" in note]
    assert any("without the blanks" in note for note in notes) == (kind == "stablelm")
    if kind == "mistral":  # Metaspace puts a space before the first word only, GenAI before each text between tokens
        (difference,) = found.differences
        assert difference.startswith('GenAI reads 2 of 10 texts otherwise than tokenizer.json, the first "<s>[INST] ')
    else:
        assert found.differences == []


def test_a_template_without_its_blanks_leaves_the_original_to_transformers(tmp_path: Path) -> None:
    real_tokenizers.save("stablelm", tmp_path / "hf", chat_template=chat_templates.ZEPHYR)
    out, _ = copied(tmp_path)
    assert AutoTokenizer.from_pretrained(out).chat_template == chat_templates.ZEPHYR
    assert "{% endif %}{% if loop.last" in config(out)["chat_template"]


def test_what_genai_loads_and_reads_well_is_copied_as_it_is(tmp_path: Path) -> None:
    real_tokenizers.save("phi3", tmp_path / "hf", chat_template=chat_templates.PHI3)
    out, notes = copied(tmp_path)
    assert notes == []
    assert (out / "tokenizer_config.json").read_bytes() == (tmp_path / "hf" / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"tokenizer_class": "OlmoTokenizer"},
         "tokenizer_class is PreTrainedTokenizerFast, as GenAI does not take OlmoTokenizer"),
        ({"tokenizer_class": None}, "tokenizer_class is PreTrainedTokenizerFast, as GenAI does not take none"),
        ({"tokenizer_class": "TokenizersBackend"}, None),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None),
        ({"clean_up_tokenization_spaces": None, "model_max_length": None, "chat_template": None}, None),
        ({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]},
         "of the chat templates (default, tool_use) GenAI takes the default one"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}]},
         "of the chat templates (tool_use) GenAI takes no one"),
        ({"name_or_path": "/srv/models/x", "is_local": True, "local_files_only": True, "vocab_file": "/srv/v.model"},
         "without is_local, local_files_only, name_or_path, vocab_file"),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>"}}, None),
    ],
)  # fmt: skip
def test_what_genai_would_not_load_is_mended(changes: dict[str, Any], note: str | None, tmp_path: Path) -> None:
    real_tokenizers.save("llama2", tmp_path / "hf", **changes)
    out, notes = copied(tmp_path)
    assert [n.removeprefix("tokenizer_config.json: ").startswith(note or "") for n in notes] == [True] * bool(note)
    genai, ours = tokenizer.load(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    assert list(genai.encode("hello there")) == ours.encode("hello there", add_special_tokens=False).ids
    assert "/srv" not in (out / "tokenizer_config.json").read_text()
    if "D" in str(changes.get("chat_template")):
        assert genai.apply_chat_template(messages="[]") == "D"


def test_a_checkpoint_with_tokenizer_json_alone_gets_its_named_tokens(tmp_path: Path) -> None:
    real_tokenizers.save("llama2", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    (tmp_path / "hf" / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (tmp_path / "hf" / "chat_template.jinja").write_text(chat_templates.MISTRAL)
    out, notes = copied(tmp_path)
    assert "tokenizer_config.json: bos_token, eos_token from special_tokens_map.json" in notes
    asked = json.dumps([{"role": "user", "content": "hi"}])
    assert tokenizer.load(out).apply_chat_template(messages=asked) == "<s>[INST] hi [/INST]"


def test_tokens_of_added_tokens_json_reach_genai(tmp_path: Path) -> None:
    size = real_tokenizers.save("llama2", tmp_path / "hf")
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps({"<|x|>": size, "<s>": 1}))
    out, notes = copied(tmp_path)
    assert notes == ["tokenizer_config.json: added_tokens_decoder has 1 tokens that are in added_tokens.json only"]
    assert size in tokenizer.load(out).encode("a<|x|>b")
    assert tokenizer.compare(AutoTokenizer.from_pretrained(tmp_path / "hf"), out).differences == []


def test_a_template_that_genai_cannot_render_is_a_note(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content.title() | wordwrap(9) }}{% endfor %}"
    real_tokenizers.save("gpt2", tmp_path / "hf", chat_template=source)
    found, _ = compared(tmp_path)
    assert found.differences == []
    assert found.notes[0].startswith("GenAI cannot render the chat template (")


def test_a_tokenizer_that_genai_cannot_load_is_refused(tmp_path: Path) -> None:
    real_tokenizers.save("gpt2", tmp_path / "hf")
    out, _ = copied(tmp_path)
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "NobodysTokenizer"}')
    with pytest.raises(VerifyError, match="GenAI cannot load the tokenizer: Unsupported tokenizer class"):
        tokenizer.load(out)
