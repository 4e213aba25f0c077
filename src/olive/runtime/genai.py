"""Text generation with ONNX Runtime GenAI: one loaded model, any number of adapters, several answers at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from olive.errors import ConfigError, OliveError
from olive.runtime import adapters as adapter_files


@dataclass(frozen=True)
class Answer:
    """What was generated, and how fast."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second, without the first, which the prompt pays for."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s and len(self.tokens) > 1 else 0.0


class Stream:
    """One answer in the making; iterate for its pieces of text. Several streams of one model may take turns."""

    def __init__(self, generator: Any, decoder: Any, prompt: list[int], max_new_tokens: int) -> None:
        self._generator, self._decoder = generator, decoder
        self._left = max_new_tokens
        self.prompt, self.tokens, self.pieces = prompt, list[int](), list[str]()
        self._prefill_s = self._decode_s = 0.0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        started = time.perf_counter()
        try:
            if not self.tokens and self._prefill_s == 0.0:
                self._generator.append_tokens(self.prompt)
            if self._left <= 0 or self._generator.is_done():
                raise StopIteration
            self._generator.generate_next_token()
            token = int(self._generator.get_next_tokens()[0])
        except RuntimeError as error:
            raise OliveError(f"ONNX Runtime GenAI stopped: {error}") from None
        self._left -= 1
        spent = time.perf_counter() - started
        if self.tokens:
            self._decode_s += spent
        else:
            self._prefill_s = spent
        self.tokens.append(token)
        self.pieces.append(self._decoder.decode(token))
        return self.pieces[-1]

    def answer(self) -> Answer:
        """Return what has been generated up to now."""
        return Answer("".join(self.pieces), list(self.tokens), len(self.prompt), self._prefill_s, self._decode_s)


class Generator:
    """A model folder loaded in GenAI, with adapters by name."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path] | None = None) -> None:
        import onnxruntime_genai

        if not (folder / "genai_config.json").is_file():
            raise ConfigError(f"{folder}: not a GenAI model folder (no genai_config.json)")
        self.folder = folder
        try:
            self._model = onnxruntime_genai.Model(str(folder))
            self.tokenizer = onnxruntime_genai.Tokenizer(self._model)
        except RuntimeError as error:
            raise OliveError(f"{folder}: ONNX Runtime GenAI cannot load it: {error}") from None
        self._adapters = onnxruntime_genai.Adapters(self._model)
        self._taken: adapter_files.AdapterInputs | None = None
        self.names: list[str] = []
        for name, file in (adapters or {}).items():
            self.load_adapter(name, file)

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._adapters = self.tokenizer = self._model = None

    def load_adapter(self, name: str, file: Path) -> None:
        """Load one more adapter; it must fit the graph."""
        if name in self.names:
            raise ConfigError(f"adapter {name}: already loaded; give it another name")
        self._taken = self._taken or adapter_files.read_graph(self.folder)
        adapter_files.check_file(file, self._taken)
        self._adapters.load(str(file), name)
        self.names.append(name)

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise ConfigError(f"adapter {name}: not loaded; loaded are {', '.join(self.names) or 'none'}")

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation (``role`` and ``content`` each) in the model's chat template."""
        import json

        try:
            text = self.tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            raise ConfigError(f"{self.folder}: no usable chat template: {str(error).rstrip('.')}; give text to go on "
                              "from, as olive generate --raw does") from None  # fmt: skip
        return self._ids(text, special="false")  # templates write such tokens themselves

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Return the token ids of a prompt, with what the tokenizer puts around a text; ``chat``: as a user's message
        in the model's chat template."""
        return self.encode_chat([{"role": "user", "content": prompt}]) if chat else self._ids(prompt, special="true")

    def _ids(self, text: str, *, special: str) -> list[int]:
        self.tokenizer.update_options(add_special_tokens=special)
        ids = [int(i) for i in self.tokenizer.encode(text)]
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        return ids

    def stream(
        self,
        prompt: str | list[int],
        *,
        adapter: str | None = None,
        max_new_tokens: int = 256,
        chat: bool = False,
        to_the_end: bool = False,
    ) -> Stream:
        """Start an answer; nothing is computed until it is iterated. ``prompt``: text or token ids. ``to_the_end``: end
        tokens are not chosen, so that the answer has all ``max_new_tokens``."""
        ids = self.encode(prompt, chat=chat) if isinstance(prompt, str) else prompt
        options = {"min_length": len(ids) + max_new_tokens} if to_the_end else {}
        generator = self._start(adapter, len(ids), max_new_tokens, **options)
        return Stream(generator, self.tokenizer.create_stream(), ids, max_new_tokens)

    def _start(self, adapter: str | None, prompt: int, new: int, **options: int) -> Any:
        import onnxruntime_genai

        if adapter is not None:
            self._known(adapter)
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        try:
            parameters.set_search_options(max_length=prompt + new, do_sample=False, num_beams=1, **options)
            generator = onnxruntime_genai.Generator(self._model, parameters)
            if adapter is not None:
                generator.set_active_adapter(self._adapters, adapter)  # before any token is read
        except RuntimeError as error:
            raise ConfigError(f"{prompt} prompt tokens and {new} new ones: {error}") from None
        return generator

    def generate_rows(
        self,
        prompts: Sequence[list[int]],
        *,
        adapter: str | None = None,
        max_new_tokens: int = 256,
        done: Callable[[list[int]], bool] = lambda _: False,
    ) -> list[list[int]]:
        """Answer several prompts of token ids at once, greedily; return their new tokens, without the end token.

        A row ends at an end token, or where ``done`` says so of its tokens."""
        pad, ends = self.tokenizer.pad_token_id, set(self.tokenizer.eos_token_ids)
        longest = max(len(ids) for ids in prompts)
        # [B, T]: GenAI finds the end of a row by the padding on its right; on its left it would be read.
        rows = np.array([ids + [pad] * (longest - len(ids)) for ids in prompts], np.int32)
        generator = self._start(adapter, longest, max_new_tokens, batch_size=len(prompts))
        found: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        try:
            generator.append_tokens(rows)
            for _ in range(max_new_tokens):
                if not open_rows or generator.is_done():
                    break
                generator.generate_next_token()
                tokens = generator.get_next_tokens()
                for row in list(open_rows):
                    token = int(tokens[row])
                    if token not in ends:
                        found[row].append(token)
                    if token in ends or done(found[row]):
                        open_rows.remove(row)
        except RuntimeError as error:
            raise OliveError(f"ONNX Runtime GenAI stopped: {error}") from None
        return found

    def generate(
        self,
        prompt: str | list[int],
        *,
        adapter: str | None = None,
        max_new_tokens: int = 256,
        chat: bool = False,
        on_token: Callable[[str], None] | None = None,
    ) -> Answer:
        """Generate greedily to the end, handing each piece of text to ``on_token``."""
        stream = self.stream(prompt, adapter=adapter, max_new_tokens=max_new_tokens, chat=chat)
        for piece in stream:
            if on_token:
                on_token(piece)
        return stream.answer()
