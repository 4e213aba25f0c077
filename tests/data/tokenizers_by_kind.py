"""Small tokenizers of the kinds that models use, trained on the shipped text."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from olive.data.rows import default_text

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@cache
def tokenizer(kind: str) -> Any:
    """``bytes``: byte-level BPE, no BOS. ``bytes_bos``: the same with BOS and EOS around a text. ``metaspace``: a
    SentencePiece-like BPE that puts a space in front of a text, with BOS. ``merging``: byte-level without
    pre-splitting, so that tokens cross any boundary."""
    if kind == "metaspace":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|endoftext|>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace()
        alphabet: list[str] = [chr(i) for i in range(32, 127)] + ["\n"]
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "merging")
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    made.train_from_iterator(default_text()[:20_000].split("\n\n"), trainer)
    if kind in ("metaspace", "bytes_bos"):
        single = "<s> $A <|endoftext|>" if kind == "bytes_bos" else "<s> $A"
        special = [(name, SPECIAL.index(name)) for name in ("<s>", "<|endoftext|>")]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<s>", chat_template=CHAT
    )


KINDS = ("bytes", "bytes_bos", "metaspace", "merging")
