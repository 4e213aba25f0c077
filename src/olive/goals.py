"""What is wanted of the result: conditions and objectives over metrics, and judging figures by them.

A hard goal is a condition: what misses it is never the best. Objectives are compared one after the other by priority:
a metric to minimize or maximize, or a soft threshold, where the shortfall is minimized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from olive.config import Config, parse
from olive.errors import ConfigError, PassError, did_you_mean
from olive.evaluate.metrics import Metric

FORMS = "as in 'kl_divergence <= 0.05', 'perplexity <= input * 1.05' or 'size_on_disk minimal'"
UNITS = {
    "bytes": {"kB": 1e3, "MB": 1e6, "GB": 1e9},
    "s": {"ms": 1e-3, "s": 1.0},
    "ms": {"ms": 1.0, "s": 1e3},
}
"""Units that the number of a text goal may have, by the unit of its metric."""
TINY = 1e-12


class Goal(Config):
    """One goal: a threshold, a threshold relative to the input model, or a direction."""

    metric: str = Field(min_length=1)
    """Name of a metric, or EVALUATOR.METRIC where several evaluators have it."""
    threshold: float | None = Field(None, allow_inf_nan=False)
    """Value to reach: at most this where less is better, at least this where more is."""
    min_improvement: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Be better than the input model by this much."""
    max_degradation: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Be worse than the input model by no more than this."""
    percent_min_improvement: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Be better than the input model by this many percent."""
    percent_max_degradation: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Be worse than the input model by no more than this many percent."""
    minimize: bool = False
    """The less the better."""
    maximize: bool = False
    """The more the better."""
    hard: bool = True
    """What misses the threshold is never the best; false: missing it by less is better."""
    priority: int | None = Field(None, ge=1)
    """Rank among the objectives, 1 first; by default the place in the list."""

    @model_validator(mode="after")
    def _one_form(self) -> Goal:
        given = self._given()
        if len(given) != 1:
            said = f"not {', '.join(given)}" if given else "none is given"
            raise ValueError(f"give one of {', '.join((*THRESHOLDS, 'minimize', 'maximize'))}; {said}")
        return self

    def _given(self) -> list[str]:
        directions = [name for name in ("minimize", "maximize") if getattr(self, name)]
        return [name for name in THRESHOLDS if getattr(self, name) is not None] + directions

    def form(self) -> str:
        """Return the field that says what is wanted."""
        return self._given()[0]

    def is_objective(self) -> bool:
        """Tell whether the goal is compared by, rather than required."""
        return self.form() not in THRESHOLDS or not self.hard

    def relative(self) -> bool:
        """Tell whether the input model has to be measured to judge by this goal."""
        return self.form() in THRESHOLDS[1:]

    def bound(self, metric: Metric, source: float | None) -> float | None:
        """Return the threshold that the goal sets, given the input model's figure; None for a direction."""
        form = self.form()
        if form not in THRESHOLDS:
            return None
        amount: float = getattr(self, form)
        if form == "threshold":
            return amount
        if source is None:
            raise PassError(f"{self.metric}: the goal is relative to the input model, which was not measured")
        step = abs(source) * amount / 100 if form.startswith("percent") else amount
        better = -1 if metric.direction == "minimize" else 1
        return source + better * (step if form.endswith("min_improvement") else -step)

    def text(self, metric: Metric) -> str:
        """Return the goal as a short line."""
        form = self.form()
        if form not in THRESHOLDS:
            return f"{self.metric} {'minimal' if form == 'minimize' else 'maximal'}"
        amount: float = getattr(self, form)
        less = metric.direction == "minimize"
        sign = "-" if less == form.endswith("min_improvement") else "+"
        percent = "%" if form.startswith("percent") else ""
        value = f"{amount:g}" if form == "threshold" else f"input {sign} {amount:g}{percent}"
        return f"{self.metric} {'<=' if less else '>='} {value}{'' if self.hard else ' (soft)'}"


THRESHOLDS = ("threshold", "min_improvement", "max_degradation", "percent_min_improvement", "percent_max_degradation")


def metric_names(evaluators: Mapping[str, Mapping[str, Metric]]) -> dict[str, Metric]:
    """Return all metrics of the evaluators by the names that figures have: METRIC, or EVALUATOR.METRIC where several
    evaluators have it."""
    counts: dict[str, int] = {}
    for own in evaluators.values():
        for name in own:
            counts[name] = counts.get(name, 0) + 1
    return {
        name if counts[name] == 1 else f"{evaluator}.{name}": metric
        for evaluator, own in evaluators.items()
        for name, metric in own.items()
    }


def read_goal(given: Any, metrics: Mapping[str, Metric], where: str, evaluators: Collection[str] = ()) -> Goal:
    """Validate a goal given as a text or a mapping; ``metrics`` are those that are measured, by ``evaluators``."""
    goal, comparison, unit = parse_goal(given, where)
    name = goal.metric
    evaluator, _, own = name.partition(".")
    if name not in metrics and evaluator in evaluators and own in metrics:
        name = own  # only one evaluator has it
    if name not in metrics:
        several = [known for known in metrics if known.endswith(f".{name}")]
        hint = f"; several evaluators have it, say which: {', '.join(several)}" if several else did_you_mean(
            name, metrics)  # fmt: skip
        raise ConfigError(f"{where}: no evaluator measures {name!r}{hint}")
    direction = metrics[name].direction
    wanted = {"<=": "minimize", ">=": "maximize"}.get(comparison or "", goal.form())
    if wanted in ("minimize", "maximize") and wanted != direction:
        better = ("less", "<=", "minimal") if direction == "minimize" else ("more", ">=", "maximal")
        raise ConfigError(f"{where}: {better[0]} {name} is better; use {better[1]} or {better[2]}")
    if not unit:
        return goal.model_copy(update={"metric": name})
    scales = UNITS.get(metrics[name].unit, {})
    if unit not in scales:
        raise ConfigError(f"{where}: unknown unit {unit!r} of {name}; allowed: {', '.join(scales) or 'none'}")
    assert goal.threshold is not None  # nothing else has a unit
    return goal.model_copy(update={"metric": name, "threshold": goal.threshold * scales[unit]})


def parse_goal(given: Any, where: str) -> tuple[Goal, str | None, str]:
    """Read a goal without knowing the metrics; also return the comparison that a text made, and the unit of its
    number."""
    if isinstance(given, Mapping):
        return parse(Goal, dict(given), f"{where}."), None, ""
    words = re.fullmatch(r"\s*([\w.:/-]+)\s*(?:(<=|>=)\s*(.+?)|(minimal|maximal))\s*", str(given))
    if not isinstance(given, str) or words is None:
        raise ConfigError(f"{where}: expected a goal {FORMS}, got {given!r}")
    metric, comparison, value, direction = words.groups()
    if direction:
        return Goal(metric=metric, minimize=direction == "minimal", maximize=direction == "maximal"), None, ""
    threshold, unit = _threshold(value, comparison, where)
    return parse(Goal, {"metric": metric, **threshold}, f"{where}."), comparison, unit


def _threshold(value: str, comparison: str, where: str) -> tuple[dict[str, float], str]:
    number = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
    plain = re.fullmatch(rf"(-?){number}\s*([a-zA-Z]*)", value)
    if plain:
        sign, amount, unit = plain.groups()
        return {"threshold": float(sign + amount)}, unit
    relative = re.fullmatch(rf"input\s*(?:([*+-])\s*{number})?", value)
    if not relative:
        raise ConfigError(f"{where}: expected a number or 'input', {FORMS}, got {value!r}")
    operator, amount = relative[1] or "+", float(relative[2] or 0)
    change = amount - 1 if operator == "*" else -amount if operator == "-" else amount
    worse = change >= 0 if comparison == "<=" else change <= 0
    name = ("percent_" if operator == "*" else "") + ("max_degradation" if worse else "min_improvement")
    return {name: round(abs(change) * (100 if operator == "*" else 1), 9)}, ""


@dataclass(frozen=True)
class Verdict:
    """Figures judged by goals."""

    feasible: bool
    """Every hard goal is met."""
    violations: dict[str, float]
    """By hard goal: how far it is missed, relative to its threshold; 0 where it is met."""
    objectives: tuple[float, ...]
    """What is to be minimized, the most important first."""
    rows: list[dict[str, Any]]
    """For the report: each goal, whether it is met (None for a direction) and the value."""

    def met(self) -> bool:
        """Tell whether every threshold is reached, the soft ones too."""
        return all(row["met"] is not False for row in self.rows)


class Judge:
    """Goals with what is needed to judge by them: the metrics' directions and the input model's figures."""

    def __init__(self, goals: Sequence[Goal], metrics: Mapping[str, Metric], source: Mapping[str, float]) -> None:
        self._goals = [(goal, metrics[goal.metric]) for goal in goals]
        self._bounds = [goal.bound(metric, source.get(goal.metric)) for goal, metric in self._goals]
        order = [place for place, goal in enumerate(goals) if goal.is_objective()]
        # A rank that is given comes before an equal one that is only the place in the list.
        self._order = sorted(
            order, key=lambda place: (goals[place].priority or place + 1, goals[place].priority is None, place)
        )

    def objectives(self) -> list[str]:
        """Return the objectives as text, the most important first."""
        return [goal.text(metric) for goal, metric in (self._goals[place] for place in self._order)]

    def judge(self, figures: Mapping[str, float]) -> Verdict:
        """Judge a model's figures; a figure that is missing or no finite number is a failure."""
        values, missed, rows, hard = [], [], [], {}
        for (goal, metric), bound in zip(self._goals, self._bounds, strict=True):
            value = figures.get(goal.metric)
            if value is None:
                raise PassError(f"{goal.metric}: was not measured, but a goal asks for it")
            if not math.isfinite(value):
                raise PassError(f"{goal.metric}: is {value}, not a finite number")
            sign, text = 1 if metric.direction == "minimize" else -1, goal.text(metric)
            beyond = 0.0 if bound is None else max(0.0, sign * (value - bound))
            values.append(sign * value)
            missed.append(beyond / max(abs(bound or 0), TINY))
            met = None if bound is None else beyond == 0
            rows.append({"goal": text, "met": met, "value": value, "bound": bound})
            if goal.hard and bound is not None:
                hard[text] = missed[-1]
        objectives = (values[place] if self._bounds[place] is None else missed[place] for place in self._order)
        return Verdict(not any(hard.values()), hard, tuple(objectives), rows)


def source_metrics(goals: Iterable[Goal]) -> set[str]:
    """Return the metrics that the input model has to be measured for."""
    return {goal.metric for goal in goals if goal.relative()}
