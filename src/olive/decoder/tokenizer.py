"""Whether everybody who reads a folder's tokenizer reads the same: the file itself, transformers, and GenAI.

The file is copied as it is. transformers 5 replaces parts of it for some families when it loads it, and GenAI has a
reader of its own, so that the three can disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("olive")

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.", "  two  spaces\tand a tab\n\nnew para\n", "naïve café – 日本語",
    "def f(x):\n    return x ** 2 # 1,234.50", "<|user|>\nhello<|end|>\n<|assistant|>\n", "don't WON'T I'll 2nd it's",
    "ﬁne ½ Ⅳ e\u0301 ＡＢＣ", "👩‍👩‍👧 🇫🇷 ok", "http://a.b/c?d=e&f=%20#g", "<s>text</s> [INST] x [/INST] <eos><bos>",
)  # fmt: skip
"""Texts that tokenizers are compared on: spaces, digits, contractions, other scripts, composed characters, markup."""


def compare(checkpoint: Path, out: Path) -> list[str]:
    """Compare the three on some texts; return what differs, as notes."""
    import onnxruntime_genai
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    expected = {text: ours.encode(text, add_special_tokens=False).ids for text in PROBES}
    try:
        genai = onnxruntime_genai.Tokenizer(str(out))
    except RuntimeError as error:
        log.warning("%s: GenAI cannot load the tokenizer: %s", out, error)
        return [f"GenAI cannot load the tokenizer: {error}"]
    notes = []
    readers = {"GenAI": lambda text: [int(i) for i in genai.encode(text)]}
    if (theirs := _transformers(checkpoint)) is not None:
        readers["transformers"] = theirs
    for reader, encode in readers.items():
        for text, ids in expected.items():
            given = encode(text)
            if given[len(given) - len(ids) :] != ids:  # a reader may put a beginning token in front
                log.warning("tokenizer.json: %s reads %r as %s, the tokenizers library as %s", reader, text, given, ids)
                notes.append(f"tokenizer: {reader} reads {text!r} differently from the tokenizers library")
                break
    return notes


def _transformers(checkpoint: Path) -> Callable[[str], list[int]] | None:
    """Return transformers' reading of a checkpoint's tokenizer; None where it has none for it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # whatever a tokenizer's own code raises
        log.info("%s: transformers cannot load the tokenizer: %s", checkpoint, error)
        return None
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
