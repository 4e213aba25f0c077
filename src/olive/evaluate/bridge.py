"""An ONNX model as lm-eval sees one: texts scored in an ONNX Runtime session over all positions, answers from GenAI.

The harness has ONNX backends of its own. They read one text at a time and know no adapters; here rows of like length
are read together.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from olive.errors import ConfigError
from olive.model import Model
from olive.runtime.genai import Generator
from olive.runtime.session import OnnxDecoder
from olive.runtime.torch_model import load_tokenizer

LOGITS = 1 << 26
"""Numbers that the logits [B, T, V] of one run may have (256 MB); rows beyond wait for the next run."""
NEW_TOKENS = 256
"""Longest answer where the task says nothing, as in the harness's own backends."""

Scored = tuple[float, bool]
"""Log likelihood of a continuation, and whether greedy decoding would give it."""


class OnnxLM(TemplateLM):
    """An ONNX folder, with an adapter if one is given."""

    def __init__(self, model: Model, adapter: Path | None, *, batch_size: int, max_length: int) -> None:
        super().__init__()
        self.tokenizer: Any = load_tokenizer(model.path, model.trust_remote_code)
        self.max_length, self.batch_size = max_length, batch_size
        self._model, self._adapter = model, adapter
        self._decoder = OnnxDecoder(model.path)
        self._generator: Generator | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return self._model.path.as_posix().replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: object) -> list[int]:
        """Tokenize; the tokenizer's first token is not put in front of a text that has it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_kwargs: object
    ) -> list[Scored]:
        """Score continuations; requests that read the same tokens, as those of one-token answers, are read once."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length {self.max_length}"
                )
            read = (context + continuation)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(read), []).append(number)
        found: dict[int, Scored] = {}
        for batch in self._batches(sorted(rows, key=lambda row: (-len(row), row))):
            for row, logits in zip(batch, self._read(batch), strict=True):
                for number in rows[row]:
                    text, _, continuation = requests[number]
                    found[number] = _score(logits[len(row) - len(continuation) : len(row)], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[number])
        return [found[number] for number in range(len(requests))]

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Deal rows out, longest first, as many at a time as their logits' size allows."""
        while rows:
            size = max(1, min(self.batch_size, LOGITS // (len(rows[0]) * self._decoder.vocabulary)))
            yield rows[:size]
            rows = rows[size:]

    def _read(self, batch: list[tuple[int, ...]]) -> np.ndarray:
        """Return logits [B, T, V] of rows that are padded on the right, where no token looks."""
        longest = len(batch[0])
        ids = np.array([[*row, *[0] * (longest - len(row))] for row in batch], np.int64)  # [B, T]
        return self._decoder.logits(ids, self._adapter, [len(row) for row in batch])

    def loglikelihood_rolling(self, requests: list[Instance], **_kwargs: object) -> list[float]:
        """Score whole texts in windows that do not overlap, each with one token before it."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], **_kwargs: object) -> list[str]:
        """Answer greedily up to a stop text, rows of like length together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found: dict[int, str] = {}
        for wish, members in groups.items():
            found |= self._answers({number: requests[number].args[0] for number in members}, json.loads(wish))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _answers(self, prompts: dict[int, str], wish: dict[str, Any]) -> dict[int, str]:
        if wish.get("do_sample") and wish.get("temperature", 1.0) > 0:
            raise ConfigError(
                f"the task asks for sampled answers ({wish}); here answers are greedy: set do_sample false"
            )
        until = wish.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        new = int(wish.get("max_gen_toks", NEW_TOKENS))
        if new >= self.max_length:
            raise ConfigError(f"max_gen_toks {new} leaves no room for a prompt in max_length {self.max_length}")
        ids = {number: self.tok_encode(text)[-(self.max_length - new) :] for number, text in prompts.items()}
        found: dict[int, str] = {}
        for part in self._together(ids):
            rows = self._genai().generate_rows(
                [ids[number] for number in part],
                adapter=None if self._adapter is None else "adapter",
                max_new_tokens=new,
                done=lambda tokens: any(stop in self._text(tokens) for stop in stops),
            )
            found |= {number: _before(self._text(tokens), stops) for number, tokens in zip(part, rows, strict=True)}
        return found

    def _together(self, ids: dict[int, list[int]]) -> Iterable[list[int]]:
        """Deal prompts out, longest first; one that ends with the padding token cannot be told from a shorter one, so
        it is read alone."""
        pad = self._genai().tokenizer.pad_token_id
        alone = [number for number, row in ids.items() if row[-1] == pad]
        rest = sorted(set(ids) - set(alone), key=lambda number: (-len(ids[number]), number))
        return [*([number] for number in alone),
                *(rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size))]  # fmt: skip

    def _genai(self) -> Generator:
        if self._generator is None:
            adapters = {} if self._adapter is None else {"adapter": self._adapter}
            self._generator = Generator(self._model.path, adapters)
        return self._generator

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _score(logits: np.ndarray, continuation: list[int]) -> Scored:
    """Score a continuation of T tokens by the logits [T, V] before each of them."""
    values = torch.from_numpy(logits).float()
    wanted = torch.tensor(continuation)
    chosen = torch.log_softmax(values, dim=-1).gather(-1, wanted[:, None])
    return float(chosen.sum()), bool((values.argmax(-1) == wanted).all())


def _before(text: str, stops: list[str]) -> str:
    """Cut a text before the first of the stops."""
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]
