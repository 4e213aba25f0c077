"""Small tokenizers built as those of real families are: the same normalizers, splits, fallbacks and templates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from olive.data.rows import default_text

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SENTENCE_PIECES = r"▁?\p{L}+|▁?\p{N}|▁?[^\p{L}\p{N}▁]+|▁+"
"""SentencePiece mixes no scripts in one piece; GenAI counts on it."""


def text() -> list[str]:
    return default_text()[:20_000].split("\n\n")


def byte_level(special: list[str], *, regex: str | None = None, nfc: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = None if regex is None else pre_tokenizers.Split(Regex(regex), "isolated")
    made.pre_tokenizer = pieces if split is None else pre_tokenizers.Sequence([split, pieces])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(text(), trainer)
    return made


def sentence_piece(special: list[str], form: str) -> Tokenizer:
    """``form``: normalizers that put a space in front (Llama 2, Phi-3), ``metaspace`` (Mistral), ``gemma``."""
    made = Tokenizer(models.BPE())
    space = pre_tokenizers.Metaspace(prepend_scheme="never" if form == "gemma" else "always")
    made.pre_tokenizer = pre_tokenizers.Sequence([space, pre_tokenizers.Split(Regex(SENTENCE_PIECES), "isolated")])
    made.train_from_iterator(text(), trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=12))
    found = json.loads(made.to_str())["model"]
    letters = sorted(found["vocab"], key=found["vocab"].get)
    order = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [tuple(pair) for pair in found["merges"]]
    vocab = {piece: i for i, piece in enumerate(order)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    strip = [] if form == "gemma" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if form == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif form == "gemma":
        made.normalizer = replace
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return made


def begins_with(made: Tokenizer, token: str) -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, made.token_to_id(token))]
    )
    return made


def named(kind: str, bos: str | None, eos: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": f"{kind}Tokenizer", "bos_token": bos, "eos_token": eos} | more


@cache
def _made(kind: str) -> tuple[Tokenizer, dict[str, Any], str]:
    """Return a tokenizer, its tokenizer_config.json and the model_type."""
    spm, llama = ["<unk>", "<s>", "</s>"], {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    end, chatml = "<|endoftext|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if kind == "gpt2":
        return byte_level([end]), named("GPT2", end, end, unk_token=end), "gpt2"
    if kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        made = begins_with(byte_level(special, regex=LLAMA3), special[0])
        return (
            made,
            named("PreTrained", special[0], special[1]) | {"tokenizer_class": "PreTrainedTokenizerFast"},
            "llama",
        )
    if kind == "qwen2":
        made = byte_level(chatml, regex=QWEN, nfc=True)
        return made, named("Qwen2", None, end, pad_token=end, add_bos_token=False, unk_token=None), "qwen2"
    if kind == "llama2":
        return begins_with(sentence_piece(spm, "normalizers"), "<s>"), named("Llama", "<s>", "</s>", **llama), "llama"
    if kind == "mistral":
        return begins_with(sentence_piece(spm, "metaspace"), "<s>"), named("Llama", "<s>", "</s>", **llama), "mistral"
    if kind == "gemma2":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        made = begins_with(sentence_piece(special, "gemma"), "<bos>")
        return made, named("Gemma", "<bos>", "<eos>", pad_token="<pad>", **llama), "gemma2"
    if kind == "phi3":
        made = sentence_piece(spm, "normalizers")
        added = (end, "<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
        made.add_special_tokens([AddedToken(token, rstrip=True, normalized=False, special=True) for token in added])
        return made, named("Llama", "<s>", end, pad_token=end, unk_token="<unk>", add_bos_token=False), "phi3"
    if kind == "gpt_neox":
        made = byte_level([end, "<|padding|>"], nfc=True)
        made.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(8, 1, -1)])
        return made, named("GPTNeoX", end, end, unk_token=end), "gpt_neox"
    if kind == "opt":
        made = begins_with(byte_level(["<s>", "<pad>", "</s>", "<unk>"]), "</s>")
        return made, named("GPT2", "</s>", "</s>", unk_token="</s>", pad_token="<pad>"), "opt"
    assert kind == "stablelm"
    return byte_level(chatml, regex=LLAMA3), named("GPT2", end, end, unk_token=end), "stablelm"


KINDS = ("gpt2", "llama3", "qwen2", "llama2", "mistral", "gemma2", "phi3", "gpt_neox", "opt", "stablelm")


def save(kind: str, folder: Path, **changes: Any) -> int:
    """Write the files of a kind, with ``changes`` to tokenizer_config.json; return the number of tokens."""
    made, config, family = _made(kind)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    size: int = made.get_vocab_size()
    return size
