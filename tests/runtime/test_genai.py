"""A built folder in ONNX Runtime GenAI: the same tokens as transformers, several adapters at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from olive.decoder import lora
from olive.decoder.build import build
from olive.decoder.options import Options
from olive.errors import ConfigError, OliveError
from olive.quant.formats.checkpoint import Checkpoint
from olive.runtime import adapters
from olive.runtime.genai import Generator
from olive.runtime.session import OnnxDecoder

PROMPT = "<|user|>\nhello there<|end|>\n<|assistant|>\n"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


def make_adapter(folder: Path, base: Path, rank: int) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(rank)
    tuned = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.4 / rank**0.5)
    tuned.save_pretrained(folder)
    return folder


def assert_greedy(model: torch.nn.Module, decoder: OnnxDecoder, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the one that transformers ranks first; a tie within twice the logit difference is excused."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        want = model(ids).logits[0, len(prompt) - 1 : -1].numpy()
    slack = 2 * np.abs(decoder.logits(ids.numpy())[0, len(prompt) - 1 : -1] - want).max()
    for row, token in zip(want, tokens, strict=True):
        assert row.max() - row[token] <= slack


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("mistral", {"sliding_window": 16}), ("phi3", {}), ("qwen2", {"tie_word_embeddings": True}),
     ("qwen3", {"head_dim": 32})],
)  # fmt: skip
def test_greedy_tokens_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "hf", family, **changes)
    assert build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())["notes"] == []
    pieces: list[str] = []
    answer = Generator(tmp_path / "onnx").generate(PROMPT, max_new_tokens=32, on_token=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(answer.tokens) == 32 or answer.tokens[-1] == 1
    assert answer.tokens_per_second > 0 and answer.prefill_tokens_per_second > 0
    prompt = Generator(tmp_path / "onnx").encode(PROMPT)
    assert_greedy(model, OnnxDecoder(tmp_path / "onnx", 1), prompt, answer.tokens)


@pytest.mark.parametrize("name", ["llama-12m", "phi3-4m", "phi3-29m", "qwen3-12m"])
def test_trained_models_answer_as_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if not (SHARED / name).is_dir():
        pytest.skip(f"the trained model {name} is not beside the repository")
    model = AutoModelForCausalLM.from_pretrained(SHARED / name, dtype=torch.float32).eval()
    assert build(Checkpoint(SHARED / name), tmp_path, Options())["notes"] == []
    generator = Generator(tmp_path)
    prompt = generator.encode("what is the best thing to see in chicago", chat=True)
    answer = generator.generate(prompt, max_new_tokens=64)
    assert_greedy(model, OnnxDecoder(tmp_path, 1), prompt, answer.tokens)


def test_a_raw_prompt_begins_as_the_tokenizer_has_it_begin(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny.checkpoint(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    first = tokenizer["added_tokens"][0]
    text, begin = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": first["content"], "type_id": 0}}
    token = {"id": first["content"], "ids": [first["id"]], "tokens": [first["content"]]}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text],
                                   "special_tokens": {first["content"]: token}}  # fmt: skip
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    generator, theirs = Generator(tmp_path / "onnx"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert generator.encode("hello there") == theirs("hello there").input_ids
    assert generator.encode("hello there")[0] == first["id"]
    chat = theirs.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert generator.encode("hello", chat=True) == chat["input_ids"]
    assert generator.encode("hello there")[0] == first["id"]  # the template did not switch it off


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("adapted")
    tiny.checkpoint(folder / "hf", "llama")
    made = {name: make_adapter(folder / name, folder / "hf", rank) for name, rank in (("a", 4), ("b", 16))}
    build(Checkpoint(folder / "hf"), folder / "onnx", Options("int4"), [made["a"]])
    files = {name: folder / "onnx" / f"{name}.onnx_adapter" for name in made}
    for name, source in made.items():
        lora.convert(source, folder / "onnx", files[name])
    return folder / "onnx", files


def test_interleaved_answers_are_those_given_alone(adapted: tuple[Path, dict[str, Path]]) -> None:
    folder, files = adapted
    names = [None, "a", "b"]
    alone = {n: Generator(folder, files).generate(PROMPT, adapter=n, max_new_tokens=24).tokens for n in names}
    generator = Generator(folder, files)
    streams = {n: generator.stream(PROMPT, adapter=n, max_new_tokens=24) for n in names}
    live = list(names)
    while live:
        live = [n for n in live if next(streams[n], None) is not None]
    assert {n: stream.tokens for n, stream in streams.items()} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 3


def test_rows_answered_together_are_those_answered_alone(adapted: tuple[Path, dict[str, Path]]) -> None:
    folder, files = adapted
    generator = Generator(folder, files)
    prompts = [[7, 8, 9], [30] * 12, [50, 60], list(range(70, 90))]
    for name in (None, "b"):
        alone = [generator.generate_rows([prompt], adapter=name, max_new_tokens=24)[0] for prompt in prompts]
        streamed = [generator.generate(prompt, adapter=name, max_new_tokens=24).tokens for prompt in prompts]
        assert [[t for t in tokens if t not in (1, 4)] for tokens in streamed] == alone  # the end is no part of it
        assert generator.generate_rows(prompts, adapter=name, max_new_tokens=24) == alone
        stops = generator.generate_rows(prompts, adapter=name, max_new_tokens=24, done=lambda tokens: len(tokens) == 5)
        assert stops == [tokens[:5] for tokens in alone]


def test_rank_zero_in_a_file_is_accepted(adapted: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, _ = adapted
    expected = adapters.read_graph(folder).inputs
    zero = {name: np.zeros([size or 0 for size in own.shape], np.float32) for name, own in expected.items()}
    adapters.write(tmp_path / "zero.onnx_adapter", zero)
    generator = Generator(folder, {"zero": tmp_path / "zero.onnx_adapter"})
    plain = generator.generate(PROMPT, max_new_tokens=8).tokens
    assert generator.generate(PROMPT, adapter="zero", max_new_tokens=8).tokens == plain


def test_adapter_errors(adapted: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, files = adapted
    generator = Generator(folder, {"a": files["a"]})
    with pytest.raises(ConfigError, match="adapter c: not loaded; loaded are a"):
        generator.stream(PROMPT, adapter="c")
    with pytest.raises(ConfigError, match="adapter a: already loaded"):
        generator.load_adapter("a", files["a"])
    name = "model.layers.7.mlp.down_proj.lora_A.weight"
    adapters.write(tmp_path / "x.onnx_adapter", {name: np.zeros((128, 2), np.float32)})
    with pytest.raises(ConfigError, match=f"the graph has no input {name}"):
        generator.load_adapter("x", tmp_path / "x.onnx_adapter")
    (tmp_path / "y.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"not an \.onnx_adapter file"):
        generator.load_adapter("y", tmp_path / "y.onnx_adapter")


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no genai_config\.json"):
        Generator(tmp_path)
    with pytest.raises(ConfigError, match=r"no model\.onnx"):
        OnnxDecoder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(OliveError, match=r"cannot load model\.onnx"):
        OnnxDecoder(tmp_path)


def test_config_is_complete(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "hf", "llama", max_position_embeddings=8192)
    generation = {"eos_token_id": [4, 1], "do_sample": True, "temperature": 0.7, "pad_token_id": None}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    build(Checkpoint(tmp_path / "hf"), tmp_path / "onnx", Options())
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [4, 1]
    assert config["model"]["context_length"] == 8192
    assert config["model"]["decoder"]["head_size"] == 16
    search = config["search"]
    assert (search["max_length"], search["do_sample"], search["temperature"]) == (4096, True, 0.7)
    assert search["past_present_share_buffer"] is True
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
