"""Token ids for calibration (equal windows) and for training (prompt masked), and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olive.data.render import render
from olive.data.rows import describe, rows
from olive.data.spec import DataSpec
from olive.errors import ConfigError

MASKED = -100
"""Label of a token that the loss leaves out (PyTorch's ``ignore_index``)."""
READ_AHEAD = 16
"""Rows are read for up to this many times the windows asked for: spread out, but not all of a large dataset."""


@dataclass(frozen=True)
class Sample:
    """One training sample of T tokens."""

    input_ids: list[int]
    labels: list[int]
    """The same tokens, the prompt's masked."""


class Samples(NamedTuple):
    """Training samples, and how many rows were dropped because nothing is to be learnt from what is left of them."""

    kept: list[Sample]
    dropped: int


def windows(spec: DataSpec, tokenizer: Any) -> Tensor:
    """Cut the data into windows of equal length, int64 [rows, T]; one shorter window where there is less than T.

    Rows are joined end to end, without special tokens. Of more than ``max_samples`` windows, some are taken evenly.
    """
    wanted = spec.max_samples
    enough = READ_AHEAD * wanted * spec.max_seq_len if wanted else None
    ids: list[int] = []
    for row in rows(spec):
        ids += _plain(tokenizer, "".join(render(row, spec, tokenizer)))
        if enough is not None and len(ids) >= enough and spec.name != "text":
            break
    return _evenly(ids, spec.max_seq_len, wanted, describe(spec))


def text_windows(text: str, tokenizer: Any, length: int, wanted: int | None) -> Tensor:
    """Cut a text into windows of ``length`` tokens, at most ``wanted`` of them: int64 [rows, T]."""
    return _evenly(_plain(tokenizer, text), length, wanted, "text")


def _evenly(ids: list[int], longest: int, wanted: int | None, where: str) -> Tensor:
    if not ids:
        raise ConfigError(f"{where}: empty: its text has no tokens")
    length = min(longest, len(ids))
    count = len(ids) // length
    cut = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)  # [rows * T] -> [rows, T]
    if wanted is None or count <= wanted:
        return cut
    return cut[[i * count // wanted for i in range(wanted)]]


def samples(spec: DataSpec, tokenizer: Any, eos_ids: Collection[int] = ()) -> Samples:
    """Return the training samples of the data; ``eos_ids`` are the ids that end the model's answers.

    Of a template, what precedes the last placeholder is masked; of a conversation, what precedes the last answer.
    Text that has no prompt is learnt whole; plain text in windows.
    """
    if spec.name == "text":
        return Samples([Sample(ids, list(ids)) for ids in windows(spec, tokenizer).tolist()], 0)
    ends = list(eos_ids)
    if tokenizer.eos_token_id is not None:
        ends.insert(0, tokenizer.eos_token_id)
    kept, dropped = [], 0
    for row in itertools.islice(rows(spec), spec.max_samples):
        prompt, answer = render(row, spec, tokenizer)
        prompt_ids, answer_ids = split_ids(tokenizer, prompt, answer, special=not spec.use_chat_template)
        answer_ids = _end(answer_ids, ends, tokenizer)
        ids = (prompt_ids + answer_ids)[: spec.max_seq_len]
        if len(ids) > max(len(prompt_ids), 1):  # nothing predicts the first token, as the end of an empty text is
            kept.append(Sample(ids, [MASKED] * len(prompt_ids) + ids[len(prompt_ids) :]))
        else:
            dropped += 1
    if not kept:
        raise ConfigError(
            f"{describe(spec)}: none of {dropped} rows has something to learn within max_seq_len = {spec.max_seq_len} "
            "tokens; raise max_seq_len, or look whether the rows are empty"
        )
    return Samples(kept, dropped)


def prompt_ids(tokenizer: Any, prompt: str, *, special: bool = True) -> list[int]:
    """Tokenize a generation prompt: with the tokens that the tokenizer puts in front of a text (BOS), none behind."""
    plain = _plain(tokenizer, prompt)
    if not special:
        return plain
    full: list[int] = tokenizer(prompt, return_attention_mask=False, verbose=False)["input_ids"]
    # A tokenizer with add_eos_token would end the prompt before the answer.
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[: start + len(plain)]
    return full


def split_ids(tokenizer: Any, prompt: str, answer: str, *, special: bool = True) -> tuple[list[int], list[int]]:
    """Tokenize prompt and answer so that the prompt's ids are those that generation starts from.

    Where a token of the whole text would reach across the boundary, the parts are tokenized one by one and joined.
    """
    first = prompt_ids(tokenizer, prompt, special=special)
    whole = prompt_ids(tokenizer, prompt + answer, special=special)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    # SentencePiece-like tokenizers put a space in front of a text, which an answer in the middle of one must not get:
    # behind a newline there is none.
    newline, behind = _plain(tokenizer, "\n"), _plain(tokenizer, "\n" + answer)
    if behind[: len(newline)] == newline:
        return first, behind[len(newline) :]
    return first, _plain(tokenizer, answer)


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _end(ids: list[int], ends: Sequence[int], tokenizer: Any) -> list[int]:
    """End an answer with an id that ends generation: cut blanks that a template writes behind it, or add one."""
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is not None and not tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1]
    return [*ids, ends[0]] if ends else ids


def collate(batch: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Pad samples on the right to one length: input_ids, labels and attention_mask, int64 [B, T]."""
    length = max(len(sample.input_ids) for sample in batch)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded([sample.input_ids for sample in batch], pad_id),
        "labels": padded([sample.labels for sample in batch], MASKED),
        "attention_mask": padded([[1] * len(sample.input_ids) for sample in batch], 0),
    }
