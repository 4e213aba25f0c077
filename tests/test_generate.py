"""``olive generate``: one answer or a chat, and what a chat does with lines that it cannot answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import tiny
from olive.cli import main
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime.genai import Generator
from runtime.test_genai import make_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that takes adapters, with the file ``a.onnx_adapter`` beside it."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.checkpoint(folder / "hf", "llama")
    adapter = make_adapter(folder / "a", folder / "hf", 4)
    build(Checkpoint(folder / "hf"), folder / "onnx", Options(), [adapter])
    lora.convert(adapter, folder / "onnx", folder / "a.onnx_adapter")
    return folder / "onnx"


def answers(model: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
            *argv: str) -> tuple[list[str], str]:  # fmt: skip
    """Chat; return what was answered to each line, and what was said beside it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["generate", "-m", str(model), "--interactive", "--max_new_tokens", "4", *argv]) == 0
    out, err = capsys.readouterr()
    return [text.removesuffix("\n") for text in out.split("> ")[1:]], err


def test_a_model_without_a_chat_template_is_told_how_to_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    argv = ["generate", "-m", str(tmp_path / "onnx"), "--prompt", "hello", "--max_new_tokens", "4"]
    assert main(argv) == 2
    assert "no usable chat template" in (said := capsys.readouterr().err)
    assert "--raw" in said
    assert main([*argv, "--raw"]) == 0


def test_a_chat_gives_the_model_all_that_was_said(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Generator(model)
    messages, expected = [], []
    for line in ("hello there", "and now"):
        messages.append({"role": "user", "content": line})
        text = generator.generate(generator.encode_chat(messages), max_new_tokens=4).text
        messages.append({"role": "assistant", "content": text})
        expected.append(text)
    found, told = answers(model, ["hello there", "and now", "", "not read"], monkeypatch, capsys)
    assert found == [*expected, ""]
    assert told.count("tokens per second") == 2


def test_a_chat_switches_adapters(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model.parent / "a.onnx_adapter"
    generator = Generator(model, {"a": file})
    base, adapted = (generator.generate("hello", adapter=name, max_new_tokens=4, chat=True).text
                     for name in (None, "a"))  # fmt: skip
    assert base != adapted
    found, _ = answers(model, ["hello"], monkeypatch, capsys, "--adapter", f"a={file}")
    assert found == [adapted, ""]
    lines = ["/adapter b", "/adapter", "hello"]
    found, told = answers(model, lines, monkeypatch, capsys, "--adapter", f"a={file}")
    assert found == ["", "", base, ""]
    assert "no adapter b; loaded: a" in told


def test_a_line_that_is_too_long_does_not_end_a_chat(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, _), _ = answers(model, ["hello"], monkeypatch, capsys)
    found, told = answers(model, ["x " * 5000, "hello"], monkeypatch, capsys)
    assert found == ["", first, ""]
    assert "error: " in told and "prompt tokens and 4 new ones" in told


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--interactive", "-p", "hi"], "--prompt: would not count beside --interactive; drop one of the two"),
        (["--interactive", "--raw"], "--raw: would not count beside --interactive"),
        (["--no_adapter", "--adapter", "a=nothing"], "--adapter: would not count beside --no_adapter"),
    ],
)
def test_flags_that_would_not_count_are_refused(
    argv: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-m", str(model), *argv]) == 2
    assert said in capsys.readouterr().err
