"""What tokens per second means, and the intervals around measurements."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from pairs import Pair

from olive.errors import ConfigError
from olive.evaluate.evaluators import Measuring, measured
from olive.evaluate.intervals import interval, percentile
from olive.evaluate.speed import Speed
from olive.model import Model
from olive.runtime.genai import Answer

NAMES = {"time_to_first_token", "tokens_per_second", "prefill_tokens_per_second"}


def test_a_real_model_gives_every_metric(pair: Pair) -> None:
    facts: dict[str, Any] = {}
    asked = Speed(prompt_tokens=16, new_tokens=8, rounds=3)
    found = measured(asked, pair.onnx, Measuring(adapter=pair.onnx_adapter, note=facts.update))
    assert set(found) == NAMES
    assert all(value > 0 for value in found.values())
    assert found["prefill_tokens_per_second"] == pytest.approx(16 / found["time_to_first_token"])
    for name, (low, high) in facts["intervals"].items():
        assert low <= found[name] <= high


def test_an_answer_is_not_ended_before_its_length(pair: Pair) -> None:
    from olive.runtime.genai import Generator

    with Generator(pair.onnx.path) as generator:
        stream = generator.stream([7, 8, 9], max_new_tokens=40, to_the_end=True)
        assert len(list(stream)) == 40
        assert not {0, 1} & set(stream.tokens)  # the ends of the tiny models


class Timed:
    """A generator whose answers take given seconds: prefill, decoding."""

    times = ((9.0, 9.0), (0.5, 2.0), (0.2, 4.0), (0.3, 1.0))

    def __init__(self, *_: Any) -> None:
        self.left = list(self.times)

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def encode(self, _: str) -> list[int]:
        return [1] * 100

    def stream(self, prompt: list[int], *, max_new_tokens: int, **_: Any) -> Any:
        prefill, decode = self.left.pop(0)

        class Stream(list[str]):
            def answer(self) -> Answer:
                return Answer("", [5] * max_new_tokens, len(prompt), prefill, decode)

        return Stream()


def test_tokens_are_counted_while_they_are_generated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not rows of a batch over the latency of a run, as in the existing tool; the warm-up does not count."""
    monkeypatch.setattr("olive.runtime.genai.Generator", Timed)
    asked = Speed(prompt_tokens=10, new_tokens=21, warmup=1, rounds=3)
    assert measured(asked, Model("onnx", tmp_path), Measuring()) == {
        "time_to_first_token": 0.3,  # the median of 0.5, 0.2 and 0.3
        "tokens_per_second": 20 / 2.0,  # the first token belongs to the prompt
        "prefill_tokens_per_second": 10 / 0.3,
    }


def test_a_prompt_longer_than_the_text_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"prompt_tokens 99999: the shipped text has [0-9]+; give fewer"):
        measured(Speed(prompt_tokens=99999), pair.onnx, Measuring())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_percentiles_are_those_of_numpy(share: float, size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).tolist()
    assert percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    source = np.random.default_rng(0)
    ranges = [interval(source.normal(3, 1, 40).tolist(), statistics.median, seed) for seed in range(200)]
    held = sum(low <= 3 <= high for low, high in ranges) / 200
    assert 0.91 <= held <= 0.98  # 95 %, give or take twice the 1.5 % that 200 trials leave open
    values = source.normal(3, 1, 40).tolist()
    assert interval(values, statistics.median, 7) == interval(values, statistics.median, 7)
    assert interval([2.0] * 5, statistics.median, 0) == (2.0, 2.0)
