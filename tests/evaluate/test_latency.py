"""Latency and memory of any ONNX graph, on inputs made up from the shapes that it declares."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from pairs import Pair

from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import LOCK, Measuring, measured
from olive.evaluate.latency import Latency, dummy_inputs, open_graph
from olive.evaluate.memory import Memory
from olive.model import Model

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 3, width] x, int64[batch, sequence_length] input_ids, int32[batch, 2] my_mask, bool switch)
  => (float[batch, 3, width] y) {
  y = If (switch) <then_branch = a () => (float[batch, 3, width] z) { z = Relu(x) },
                   else_branch = b () => (float[batch, 3, width] z) { z = Neg(x) }>
}
"""


@pytest.fixture
def graph(tmp_path: Path) -> Model:
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "any.onnx")
    return Model("onnx", tmp_path)


def test_inputs_are_made_up_from_their_declarations(graph: Model) -> None:
    session = open_graph(graph.path / "any.onnx")
    made = dummy_inputs(session, {"width": 5, "batch": 2}, 0, "g")
    assert {name: (value.shape, str(value.dtype)) for name, value in made.items()} == {
        "x": ((2, 3, 5), "float32"), "input_ids": ((2, 128), "int64"), "my_mask": ((2, 2), "int32"),
        "switch": ((), "bool"),
    }  # fmt: skip
    assert made["x"].std() > 0.1
    assert (made["my_mask"] == 1).all()
    assert bool(made["switch"])
    assert np.array_equal(made["x"], dummy_inputs(session, {"width": 5, "batch": 2}, 0, "g")["x"])


def test_percentiles_are_in_order_and_have_their_ranges(graph: Model) -> None:
    facts: dict[str, Any] = {}
    found = measured(Latency(dims={"width": 5}, rounds=30), graph, Measuring(note=facts.update))
    assert 0 < found["latency_p50"] <= found["latency_p90"] <= found["latency_p99"]
    assert facts["inputs"]["x"] == [1, 3, 5]
    for name, (low, high) in facts["intervals"].items():
        assert low <= found[name] <= high


def test_rounds_are_timed_one_by_one_after_the_warm_up(graph: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    clock = iter(float(tick * tick) for tick in range(100))  # a start, and an end of each measured run

    class Session:
        def run(self, *_: Any) -> None:
            runs.append(1)

        def get_inputs(self) -> list[Any]:
            return []

    monkeypatch.setattr("olive.evaluate.latency.open_graph", lambda _: Session())
    monkeypatch.setattr("olive.evaluate.latency.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = Latency(warmup=2, rounds=3).measure(graph, Measuring())
    assert len(runs) == 5
    times = [1e3 * ((t + 1) ** 2 - t**2) for t in (2, 4, 6)]  # the warm-up has read the clock twice, at 0 and 1
    assert found["latency_p50"] == pytest.approx(times[1])


def test_a_decoder_with_a_cache_needs_no_sizes(pair: Pair) -> None:
    facts: dict[str, Any] = {}
    measured(Latency(warmup=0, rounds=2), pair.onnx, Measuring(note=facts.update))
    assert facts["inputs"]["attention_mask"] == [1, 128]
    assert facts["inputs"]["past_key_values.0.key"] == [1, 2, 0, 16]


def test_sizes_that_do_not_fit_are_refused(graph: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"input x \['batch', 3, 'width'\]: how large is width\? Give dims: width=N"):
        measured(Latency(), graph, Measuring())
    with pytest.raises(ConfigError, match="no symbolic dimension heigth; it has: batch, sequence_length, width"):
        measured(Latency(dims={"heigth": 1}), graph, Measuring())
    with pytest.raises(ConfigError, match="dims: width=-1: a size is 0 or more"):
        measured(Latency(dims={"width": -1}), graph, Measuring())
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "second.onnx")
    with pytest.raises(
        ConfigError, match=r"expected model\.onnx or one other \.onnx file, found any\.onnx, second\.onnx"
    ):
        measured(Latency(), graph, Measuring())
    (tmp_path / "second.onnx").unlink()
    (tmp_path / "any.onnx").write_bytes(b"nothing")
    with pytest.raises(OliveError, match=r"any\.onnx: ONNX Runtime cannot load it"):
        measured(Latency(), graph, Measuring())


def test_two_measurements_of_time_wait_for_each_other(graph: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock, Timeout

    def look(_: Path) -> Any:
        with pytest.raises(Timeout), FileLock(LOCK, timeout=0):
            pass
        raise LookupError("looked")

    monkeypatch.setattr("olive.evaluate.latency.open_graph", look)
    with pytest.raises(LookupError, match="looked"):
        measured(Latency(), graph, Measuring())


def test_memory_is_that_of_a_fresh_process(graph: Model) -> None:
    ballast = np.ones(40_000_000)  # 320 MB of this process must not count
    small = measured(Memory(dims={"width": 1}), graph, Measuring())["peak_memory"]
    large = measured(Memory(dims={"width": 10_000_000}), graph, Measuring())["peak_memory"]
    assert ballast.sum() == 40_000_000
    assert small < 250e6
    assert large - small > 2 * 3 * 10_000_000 * 4 * 0.9  # input and output


def test_memory_of_a_language_model_in_genai(pair: Pair) -> None:
    found = measured(Memory(prompt_tokens=8, new_tokens=2), pair.onnx, Measuring(adapter=pair.onnx_adapter))
    assert 20e6 < found["peak_memory"] < 400e6


def test_a_process_that_fails_says_why(graph: Model) -> None:
    with pytest.raises(OliveError, match=r"process that measures memory failed: .*how large is width\?"):
        measured(Memory(), graph, Measuring())
