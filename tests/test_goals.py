"""Goals: what their texts mean, what is refused, and how figures are judged."""

from __future__ import annotations

import pytest

from olive.errors import ConfigError, PassError
from olive.evaluate.metrics import METRICS, Metric
from olive.goals import Goal, Judge, metric_names, read_goal

SPEED = Metric("speed", "maximize", "tokens/s", "")
LOSS = Metric("loss", "minimize", "", "")
SIZE = Metric("size", "minimize", "bytes", "")
DELAY = Metric("delay", "minimize", "s", "")
LATENCY = Metric("latency", "minimize", "ms", "")
KNOWN = {"speed": SPEED, "loss": LOSS, "size": SIZE, "delay": DELAY, "latency": LATENCY}


def goal(given: object) -> Goal:
    return read_goal(given, KNOWN, "goals.0")


@pytest.mark.parametrize(
    ("given", "source", "bound"),
    [
        ("loss <= 0.05", 9.0, 0.05),
        ("speed >= 20", 9.0, 20.0),
        ("size <= 1.5GB", 9.0, 1.5e9),
        ("loss<=1e-3", 9.0, 1e-3),
        ("delay <= 20ms", 9.0, 0.02),
        ("latency <= 20 ms", 9.0, 20.0),
        ("latency <= 0.5s", 9.0, 500.0),
        ("loss <= input", 4.0, 4.0),
        ("loss <= input * 1.05", 4.0, 4.2),
        ("loss <= input * 0.9", 4.0, 3.6),
        ("speed >= input * 2", 10.0, 20.0),
        ("speed >= input * 0.95", 10.0, 9.5),
        ("loss <= input + 0.5", 4.0, 4.5),
        ("speed >= input - 2", 10.0, 8.0),
        ({"metric": "loss", "threshold": 0.05}, 9.0, 0.05),
        ({"metric": "loss", "min_improvement": 1}, 4.0, 3.0),
        ({"metric": "loss", "max_degradation": 1}, 4.0, 5.0),
        ({"metric": "speed", "min_improvement": 1}, 4.0, 5.0),
        ({"metric": "speed", "max_degradation": 1}, 4.0, 3.0),
        ({"metric": "loss", "percent_min_improvement": 25}, 4.0, 3.0),
        ({"metric": "loss", "percent_max_degradation": 25}, 4.0, 5.0),
        ({"metric": "speed", "percent_min_improvement": 25}, 4.0, 5.0),
        ({"metric": "speed", "percent_max_degradation": 25}, 4.0, 3.0),
        # of a negative figure the better side is still the better side
        ({"metric": "loss", "percent_max_degradation": 25}, -4.0, -3.0),
    ],
)
def test_a_threshold_is_where_it_says(given: object, source: float, bound: float) -> None:
    wanted = goal(given)
    assert wanted.bound(KNOWN[wanted.metric], source) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("given", ["loss minimal", "speed maximal", {"metric": "loss", "minimize": True}])
def test_a_direction_has_no_threshold(given: object) -> None:
    wanted = goal(given)
    assert wanted.bound(KNOWN[wanted.metric], 1.0) is None
    assert wanted.is_objective()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("loss", "goals.0: expected a goal as in 'kl_divergence <= 0.05'"),
        ("loss < 3", "goals.0: expected a goal as in"),
        (3, "goals.0: expected a goal as in"),
        ("loss <= much", "goals.0: expected a number or 'input', as in"),
        ("size <= 3 TB", "goals.0: unknown unit 'TB' of size; allowed: kB, MB, GB"),
        ("size <= 3 ms", "goals.0: unknown unit 'ms' of size; allowed: kB, MB, GB"),
        ("loss <= 3GB", "goals.0: unknown unit 'GB' of loss; allowed: none"),
        ("loss <= 1e999", "goals.0.threshold: input should be a finite number, got inf"),
        ({"metric": "loss", "threshold": float("nan")}, "goals.0.threshold: input should be a finite number"),
        ("los <= 3", "goals.0: no evaluator measures 'los'; did you mean 'loss'?"),
        ("loss >= 3", "goals.0: less loss is better; use <= or minimal"),
        ("speed minimal", "goals.0: more speed is better; use >= or maximal"),
        ({"metric": "speed", "minimize": True}, "goals.0: more speed is better"),
        ({"metric": "loss"}, "goals.0: give one of threshold, min_improvement, .*; none is given"),
        ({"metric": "loss", "threshold": 1, "minimize": True}, "goals.0: give one of .*; not threshold, minimize"),
        ({"metric": "loss", "treshold": 1}, "goals.0.treshold: unknown option; did you mean 'threshold'?"),
    ],
)
def test_mistakes_are_told_with_their_place(given: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        goal(given)


def test_a_metric_of_several_evaluators_is_addressed_with_its_evaluator() -> None:
    names = metric_names({"books": {"loss": LOSS}, "news": {"loss": LOSS, "speed": SPEED}})
    assert list(names) == ["books.loss", "news.loss", "speed"]
    evaluators = ("books", "news")
    assert read_goal("books.loss minimal", names, "g", evaluators).metric == "books.loss"
    assert read_goal("news.speed maximal", names, "g", evaluators).metric == "speed"
    with pytest.raises(ConfigError, match=r"no evaluator measures 'nws.speed'"):
        read_goal("nws.speed maximal", names, "g", evaluators)
    with pytest.raises(ConfigError, match=r"several evaluators have it, say which: books.loss, news.loss"):
        read_goal("loss minimal", names, "g")


def test_perplexity_and_divergence_are_better_the_lower() -> None:
    assert {METRICS[name].direction for name in ("perplexity", "kl_divergence")} == {"minimize"}
    with pytest.raises(ConfigError, match="less perplexity is better"):
        read_goal("perplexity maximal", METRICS, "g")


def judge(*given: object, source: dict[str, float] | None = None) -> Judge:
    return Judge([goal(one) for one in given], KNOWN, source or {})


def test_a_hard_goal_decides_what_is_feasible_and_a_soft_one_does_not() -> None:
    hard = judge("loss <= 2", "size minimal").judge({"loss": 3.0, "size": 10.0})
    assert not hard.feasible
    assert hard.violations == {"loss <= 2": 0.5}
    assert hard.objectives == (10.0,)
    soft = judge({"metric": "loss", "threshold": 2, "hard": False}, "size minimal").judge({"loss": 3.0, "size": 10.0})
    assert soft.feasible
    assert soft.violations == {}
    assert soft.objectives == (0.5, 10.0)
    assert not soft.met()


def test_a_threshold_itself_is_good_enough() -> None:
    assert judge("loss <= 2").judge({"loss": 2.0}).feasible
    assert judge("speed >= 2").judge({"speed": 2.0}).feasible


def test_objectives_are_in_the_order_of_their_priority_and_all_minimized() -> None:
    order = judge("size minimal", {"metric": "speed", "maximize": True, "priority": 1}, "loss minimal")
    assert order.judge({"size": 1.0, "speed": 5.0, "loss": 7.0}).objectives == (-5.0, 1.0, 7.0)
    first = judge({"metric": "size", "minimize": True, "priority": 2}, {"metric": "speed", "maximize": True,
                                                                      "priority": 1})  # fmt: skip
    assert first.judge({"size": 1.0, "speed": 5.0}).objectives == (-5.0, 1.0)


def test_goals_are_told_with_their_value() -> None:
    rows = (
        judge("loss <= input * 1.05", "speed >= input - 1", "size minimal", source={"loss": 2.0, "speed": 5.0})
        .judge({"loss": 2.05, "speed": 3.0, "size": 7.0})
        .rows
    )
    assert rows == [
        {"goal": "loss <= input + 5%", "met": True, "value": 2.05, "bound": 2.1},
        {"goal": "speed >= input - 1", "met": False, "value": 3.0, "bound": 4.0},
        {"goal": "size minimal", "met": None, "value": 7.0, "bound": None},
    ]


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({}, "loss: was not measured, but a goal asks for it"),
        ({"loss": float("nan")}, "loss: is nan, not a finite number"),
        ({"loss": float("inf")}, "loss: is inf, not a finite number"),
    ],
)
def test_a_figure_that_is_missing_or_no_number_is_a_failure(figures: dict[str, float], told: str) -> None:
    with pytest.raises(PassError, match=told):
        judge("loss minimal").judge(figures)


def test_a_relative_goal_needs_the_input_model() -> None:
    with pytest.raises(PassError, match="loss: the goal is relative to the input model, which was not measured"):
        judge("loss <= input * 1.05")
