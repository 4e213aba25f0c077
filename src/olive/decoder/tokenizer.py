"""Whether everybody who reads text with a folder's tokenizer reads the same: the file itself, GenAI, and transformers.

tokenizer.json is copied as it is. GenAI has a reader of its own, and transformers 5 replaces parts of the file for some
families when it loads it, so that the three can disagree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olive.data.rows import heldout_text
from olive.decoder import chat
from olive.errors import VerifyError

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.", "two  spaces\tand a tab\n\nnew para\n", "naïve café – 日本語",
    "def f(x):\n    return x ** 2 # 1,234.50", "don't WON'T I'll 2nd it's", "👩‍👩‍👧 🇫🇷 ok", "http://a.b/c?d=e&f=%20#g",
)  # fmt: skip
"""Ordinary texts, which must be read as tokenizer.json says: spaces, digits, contractions, code, other scripts."""
RARE = ("  spaces in front", "e\u0301 as two characters", "ﬁne ½ Ⅳ ＡＢＣ")
"""Texts that some readers normalize and others do not; also a text beside special tokens. Worth a note."""
Encode = Callable[[str], list[int]]


@dataclass
class Comparison:
    """How a folder's tokenizer is read."""

    differences: list[str] = field(default_factory=list)
    """Where GenAI reads ordinary text, or a conversation in the chat template, otherwise than tokenizer.json."""
    notes: list[str] = field(default_factory=list)
    """Other differences."""


def load(folder: Path) -> Any:
    """Return GenAI's tokenizer of an output folder."""
    import onnxruntime_genai

    try:
        return onnxruntime_genai.Tokenizer(str(folder))
    except RuntimeError as error:
        raise VerifyError(f"{folder}: ONNX Runtime GenAI cannot load the tokenizer: {error}") from None


def compare(transformers: Any, out: Path) -> Comparison:
    """Compare an output folder's tokenizer.json, GenAI and the source's tokenizer in transformers."""
    ours, genai, found = _tokenizers(out), load(out), Comparison()

    def expected(text: str) -> list[int]:
        ids: list[int] = ours.encode(text, add_special_tokens=False).ids
        return ids

    def runs(text: str) -> list[int]:
        return [int(i) for i in genai.encode(text)]

    def theirs(text: str) -> list[int]:
        ids: list[int] = transformers.encode(text, add_special_tokens=False)
        return ids

    ordinary = (*TEXTS, heldout_text()[:2000])
    chats = list(_chats(transformers, genai, found))
    found.differences += _differ("GenAI", runs, expected, [*ordinary, *chats])
    special = [token.content for token in ours.get_added_tokens_decoder().values() if token.special][:8]
    rare = (*RARE, *(f"one{text}two {text} three" for text in special))
    found.notes += _differ("GenAI", runs, expected, rare)
    found.notes += _differ("transformers", theirs, expected, (*ordinary, *rare, *chats))
    _around(ours, genai, transformers, found)
    return found


def _tokenizers(out: Path) -> Any:
    """Return the file as the tokenizers library reads it, with the added tokens that stand elsewhere."""
    from tokenizers import AddedToken, Tokenizer

    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    added = (chat.read(out / "tokenizer_config.json").get("added_tokens_decoder") or {}).values()
    ours.add_tokens([AddedToken(**{k: v for k, v in one.items() if not k.startswith("__")})
                     for one in added if ours.token_to_id(one["content"]) is None])  # fmt: skip
    return ours


def _differ(reader: str, reads: Encode, expected: Encode, texts: Iterable[str]) -> list[str]:
    """Return a sentence if some text is read otherwise than expected, with the first and where it starts to differ."""
    texts = list(texts)
    wrong = [text for text in texts if reads(text) != expected(text)]
    if not wrong:
        return []
    given, ids = reads(wrong[0]), expected(wrong[0])
    at = next(
        (i for i, pair in enumerate(zip(given, ids, strict=False)) if len(set(pair)) > 1), min(map(len, (given, ids)))
    )
    shown = wrong[0] if len(wrong[0]) <= 80 else f"{wrong[0][:80]}..."
    return [f"{reader} reads {len(wrong)} of {len(texts)} texts otherwise than tokenizer.json, the first {shown!r}: "
            f"from token {at} on {given[at : at + 4]}, not {ids[at : at + 4]}"]  # fmt: skip


def _chats(transformers: Any, genai: Any, found: Comparison) -> Iterable[str]:
    """Yield conversations as transformers renders them; note where GenAI renders them otherwise."""
    if getattr(transformers, "chat_template", None) is None:
        return
    rendered, notes = 0, []
    for turns in chat.CONVERSATIONS:
        try:
            text = transformers.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception:  # whatever a template raises: it does not take this conversation
            continue
        rendered += 1
        try:
            given = genai.apply_chat_template(messages=json.dumps(turns), add_generation_prompt=True)
            if given != text:
                notes.append(f"GenAI renders the chat template otherwise than transformers: {given!r}, not {text!r}")
        except RuntimeError as error:
            notes.append(f"GenAI cannot render the chat template ({error}): give it whole prompts")
        yield text
    found.notes += notes[:1]
    if not rendered:
        found.notes.append("transformers cannot render the chat template")


def _around(ours: Any, genai: Any, transformers: Any, found: Comparison) -> None:
    """Note which tokens are put before and after a text, where that differs."""
    text, added = "hello", ours.get_added_tokens_decoder()
    genai.update_options(add_special_tokens="true")
    try:
        asked = [int(i) for i in genai.encode(text)]
    finally:
        genai.update_options(add_special_tokens="false")
    bare, file = ours.encode(text, add_special_tokens=False).ids, transformers.encode(text)
    put = [added[i].content for i in file if i in added]
    if file != bare:
        found.notes.append(f"transformers puts {' '.join(put)} around a text, GenAI only with "
                           "update_options(add_special_tokens='true'); chat templates do it themselves")  # fmt: skip
    if asked != file:
        found.notes.append(f"with special tokens, GenAI reads {text!r} as {asked}, transformers as {file}")
