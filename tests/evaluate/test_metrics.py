"""What every metric and every evaluator promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from olive.config import parse
from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import EVALUATORS, Evaluator, Measuring, check, evaluator_class, evaluator_name, measured
from olive.evaluate.metrics import METRICS, Metric
from olive.evaluate.size import Size
from olive.model import Model

REQUIRED = {"lm_eval": {"tasks": ["x"]}, "function": {"file": "f.py", "function": "score", "direction": "minimize"}}


def make(name: str) -> Evaluator:
    return parse(evaluator_class(name), REQUIRED.get(name, {}), "")


def test_every_metric_has_a_direction_a_unit_and_help() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.direction in ("minimize", "maximize")
        assert metric.help
    assert {m.unit for m in METRICS.values()} == {"", "nats/token", "s", "tokens/s", "ms", "bytes"}


@pytest.mark.parametrize("name", ["perplexity", "kl_divergence", "time_to_first_token", "latency_p99", "peak_memory"])
def test_less_is_better(name: str) -> None:
    """Perplexity among them: the existing tool ranked it the other way round."""
    assert METRICS[name].better(1.0, 2.0)
    assert not METRICS[name].better(2.0, 1.0)


@pytest.mark.parametrize("name", ["top1_agreement", "accuracy", "f1", "exact_match", "tokens_per_second"])
def test_more_is_better(name: str) -> None:
    assert METRICS[name].better(2.0, 1.0)


def test_an_equal_value_is_not_better() -> None:
    assert not any(metric.better(1.0, 1.0) for metric in METRICS.values())


def test_there_is_no_throughput_of_batch_over_latency() -> None:
    """tokens_per_second is counted while tokens are generated; see test_speed.py."""
    assert not [name for name in METRICS if "throughput" in name]


@pytest.mark.parametrize("name", EVALUATORS)
def test_contract_of_every_evaluator(name: str) -> None:
    kind = evaluator_class(name)
    assert kind.__doc__
    assert all(field.description for field in kind.model_fields.values()), "every option has help"
    evaluator = make(name)
    assert evaluator_name(evaluator) == name
    assert kind.model_validate(evaluator.model_dump(mode="json")) == evaluator
    assert set(kind.names) <= set(METRICS)
    if name != "lm_eval":  # its metrics are those of its tasks; see test_harness.py
        assert all(isinstance(metric, Metric) for metric in evaluator.metrics().values())
        assert set(evaluator.metrics()) <= {*kind.names, "score"}
        assert evaluator.metrics()


def test_metrics_of_time_are_measured_alone() -> None:
    assert {name for name in EVALUATORS if evaluator_class(name).exclusive} == {"speed", "latency"}


def test_every_metric_has_one_evaluator() -> None:
    given = [metric for name in EVALUATORS for metric in evaluator_class(name).names]
    assert sorted(given) == sorted(METRICS)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="here: unknown evaluator 'sped'; did you mean 'speed'"):
        evaluator_class("sped", "here")
    with pytest.raises(ConfigError, match="round: unknown option; did you mean 'rounds'"):
        parse(evaluator_class("speed"), {"round": 3}, "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failed_measurement_is_an_error_and_no_number(value: float) -> None:
    """The existing tool ranked a missing metric first where less is better."""
    metrics = {"perplexity": METRICS["perplexity"]}
    with pytest.raises(OliveError, match=f"quality of m: perplexity is {value}, which is no measurement"):
        check({"perplexity": value}, metrics, "quality of m")
    with pytest.raises(OliveError, match="quality of m: gave no perplexity"):
        check({}, metrics, "quality of m")
    with pytest.raises(OliveError, match="gave accuracy, which is none of its metrics: perplexity"):
        check({"perplexity": 1.0, "accuracy": 1.0}, metrics, "quality of m")


def test_a_kind_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"speed measures onnx models, and this is one of kind hf; .* olive auto-opt"):
        measured(make("speed"), Model("hf", tmp_path), Measuring())


def test_size_is_that_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 70)
    (tmp_path / "sub" / "b.bin").write_bytes(b"x" * 30)
    (tmp_path / ".hidden").write_bytes(b"x" * 1000)
    assert measured(Size(), Model("onnx", tmp_path), Measuring()) == {"size_on_disk": 100.0}
