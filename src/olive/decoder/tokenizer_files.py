"""The tokenizer's files of an output folder: copied as they are, but for what GenAI would not load or would misread.

tokenizer.json is never changed. tokenizer_config.json is, where GenAI needs it to be; it says what for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olive.decoder import chat
from olive.decoder.chat import read
from olive.errors import ConfigError

CONFIG = "tokenizer_config.json"
FILES = (
    "config.json", "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
LEFTOVERS = (
    "name_or_path",
    "is_local",
    "local_files_only",
    "tokenizer_file",
    "special_tokens_map_file",
    "_commit_hash",
)
"""What loaders leave in tokenizer_config.json: where the tokenizer lay on the machine that wrote it."""
CLASSES = (
    "BaichuanTokenizer", "ChatGLMTokenizer", "CLIPTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer",
    "GemmaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "InternLM2Tokenizer", "LlamaTokenizer",
    "PreTrainedTokenizer", "Qwen2Tokenizer", "TokenizersBackend", "WhisperTokenizer",
)  # fmt: skip
"""What GenAI takes as the class of a BPE tokenizer, each also with ``Fast``; the reading is the same for all."""
ANY_BPE, UNIGRAM = "PreTrainedTokenizerFast", "T5Tokenizer"


def check(folder: Path) -> None:
    """Refuse a checkpoint without the tokenizer file that GenAI needs."""
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder}: no tokenizer.json, which ONNX Runtime GenAI reads; write one with transformers: "
                          "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """The tokens of a checkpoint that have a meaning of their own."""

    added: dict[str, int]
    """Ids of the added tokens by their text."""
    outside: frozenset[str]
    """Those that tokenizer.json does not have."""
    named: dict[str, str]
    """Texts by role: ``bos_token``, ``eos_token``, ``eot_token``, ``pad_token`` and others."""
    kind: str
    """Of the tokenizer's model: ``BPE``, ``Unigram`` or another."""
    adds: tuple[bool, bool]
    """Whether the tokenizer puts tokens before and after a text."""
    largest: int
    """The highest id."""

    @classmethod
    def read(cls, folder: Path) -> Tokens:
        """Read a checkpoint's tokenizer.json and what stands beside it."""
        content = read(folder / "tokenizer.json")
        model = content.get("model") or {}
        vocab = model.get("vocab") or {}
        known = vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
        inside = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        # older checkpoints keep some here; transformers still reads them
        added = {text: i for text, i in read(folder / "added_tokens.json").items() if text not in known} | inside
        config = read(folder / CONFIG)
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            added.setdefault(token["content"], int(i))
        given = read(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in given.items() if k.endswith("_token")}
        return cls(
            added=added,
            outside=frozenset(added.keys() - inside.keys()),
            named={role: text for role, text in named.items() if isinstance(text, str)},
            kind=str(model.get("type", "BPE")),
            adds=_adds(content.get("post_processor")),
            largest=max([-1, *known.values(), *added.values()]),
        )

    def id(self, role: str) -> int | None:
        """Return the id of the token with a role."""
        return self.added.get(self.named.get(role, ""))


def _adds(processor: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """Return whether a post-processor puts tokens before and after a text."""
    if processor is None:
        return False, False
    steps = [_adds(step) for step in processor.get("processors", [])]
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        steps.append((True, True))
    single = ["Sequence" in piece for piece in processor.get("single", [])]
    if True in single:
        text = single.index(True)
        steps.append((text > 0, text < len(single) - 1))
    return any(before for before, _ in steps), any(after for _, after in steps)


def copy(folder: Path, out: Path, tokens: Tokens) -> list[str]:
    """Copy a checkpoint's files and write a tokenizer_config.json that GenAI loads; return what differs, as notes."""
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    given = read(folder / CONFIG)
    config, notes = _without_places(given)
    notes += _fit_class(config, tokens) + _fit_tokens(config, tokens) + _fit_template(config, folder, out, tokens)
    if config != given or not (out / CONFIG).is_file():
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (out / CONFIG).write_text(text, encoding="utf-8")
    return [f"{CONFIG}: {note}" for note in notes]


def _without_places(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leave out paths, and empty settings (GenAI stops at some); a token's role may be empty."""
    texts = {key: v for key, v in given.items() if isinstance(v, str) and not key.endswith(("_token", "_template"))}
    places = {key for key, v in texts.items() if v.startswith(("/", "~")) or v[1:3] in (":\\", ":/")}
    places |= given.keys() & set(LEFTOVERS)
    empty = {key for key, value in given.items() if value is None and not key.endswith("_token")}
    notes = [f"without {', '.join(sorted(places))}"] if places else []
    return {key: value for key, value in given.items() if key not in places | empty}, notes


def _fit_class(config: dict[str, Any], tokens: Tokens) -> list[str]:
    """GenAI refuses a class that it does not know, though it reads the same file for all of them; without a class it
    looks at no named tokens."""
    given = config.get("tokenizer_class", "")
    if tokens.kind == "Unigram":
        fits = given.removesuffix("Fast") in (UNIGRAM, "XLMRobertaTokenizer")
    else:
        fits = given.removesuffix("Fast") in CLASSES
    if fits:
        return []
    config["tokenizer_class"] = UNIGRAM if tokens.kind == "Unigram" else ANY_BPE
    return [f"tokenizer_class is {config['tokenizer_class']}, as GenAI does not take {given or 'none'}"]


def _fit_tokens(config: dict[str, Any], tokens: Tokens) -> list[str]:
    """GenAI reads named and added tokens in this file only, and guesses from texts whether some are put in front."""
    notes = []
    missing = {role: text for role, text in tokens.named.items() if config.get(role) is None}
    if missing:
        config |= missing
        notes.append(f"{', '.join(sorted(missing))} from special_tokens_map.json")
    before, after = tokens.adds
    if (before or after) and "add_bos_token" not in config and "add_eos_token" not in config:
        config |= {"add_bos_token": before, "add_eos_token": after}
        notes.append(f"add_bos_token is {before}, add_eos_token {after}, as in tokenizer.json")
    known = config.get("added_tokens_decoder") or {}
    extra = {text: tokens.added[text] for text in sorted(tokens.outside - {t["content"] for t in known.values()})}
    if extra:
        special = set(tokens.named.values())
        described = {str(i): _described(text, special=text in special) for text, i in extra.items()}
        config["added_tokens_decoder"] = known | described
        notes.append(f"added_tokens_decoder has {len(extra)} tokens that are in added_tokens.json only")
    return notes


def _described(text: str, *, special: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": not special, "single_word": False,
            "special": special}  # fmt: skip


def _fit_template(config: dict[str, Any], folder: Path, out: Path, tokens: Tokens) -> list[str]:
    """GenAI takes one template, and prefers the one in tokenizer_config.json, while transformers prefers the file."""
    given, chosen = config.get("chat_template"), chat.template(folder)
    notes = []
    if isinstance(given, list):
        names = ", ".join(str(one.get("name")) for one in given)
        notes.append(f"of the chat templates ({names}) GenAI takes {'no' if chosen is None else 'the default'} one")
        del config["chat_template"]
    if chosen is None:
        return notes
    fitted = chat.for_genai(chosen, tokens.named)
    if fitted != chosen:
        (out / "chat_template.jinja").write_text(chosen, encoding="utf-8")
        notes.append("chat_template without the blanks around tags that transformers skips and GenAI would write; "
                     "the original is in chat_template.jinja")  # fmt: skip
    if fitted != chosen or "chat_template" in config or not (out / "chat_template.jinja").is_file():
        config["chat_template"] = fitted
    return notes
