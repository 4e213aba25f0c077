"""How fast a language model answers, in the runtime that will use it: ONNX Runtime GenAI."""

from __future__ import annotations

import statistics

from pydantic import Field

from olive.errors import ConfigError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.intervals import interval
from olive.model import Model


class Speed(Evaluator):
    """Time to the first token, and tokens per second while the prompt is read and while the answer is written.

    Rounds are alike: the same prompt from the shipped text, the same number of new tokens, one answer at a time. The
    median counts; the report has the range that holds it with 95 % confidence.
    """

    names = ("time_to_first_token", "tokens_per_second", "prefill_tokens_per_second")
    kinds = ("onnx",)
    exclusive = True

    prompt_tokens: int = Field(128, ge=1)
    """Length of the prompt."""
    new_tokens: int = Field(64, ge=2)
    """Length of the answer; it is not ended before."""
    warmup: int = Field(1, ge=0)
    """Rounds before the measured ones."""
    rounds: int = Field(5, ge=1)
    """Rounds that are measured."""

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        from olive.data.rows import heldout_text
        from olive.runtime.genai import Generator

        adapters = {"adapter": ctx.adapter} if ctx.adapter is not None else {}
        answers = []
        with Generator(model.path, adapters) as generator:
            prompt = generator.encode(heldout_text())[: self.prompt_tokens]
            if len(prompt) < self.prompt_tokens:
                raise ConfigError(f"prompt_tokens {self.prompt_tokens}: the shipped text has {len(prompt)}; give fewer")
            for _ in range(self.warmup + self.rounds):
                stream = generator.stream(
                    prompt, adapter=next(iter(adapters), None), max_new_tokens=self.new_tokens, to_the_end=True
                )
                for _ in stream:
                    pass
                answers.append(stream.answer())
        measured = answers[self.warmup :]
        series = {
            "time_to_first_token": [answer.prefill_s for answer in measured],
            "tokens_per_second": [answer.tokens_per_second for answer in measured],
            "prefill_tokens_per_second": [answer.prefill_tokens_per_second for answer in measured],
        }
        ctx.note(intervals={name: interval(values, statistics.median, ctx.seed) for name, values in series.items()})
        return {name: statistics.median(values) for name, values in series.items()}
