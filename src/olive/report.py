"""The record of a run: what ran and what was cached, facts, sizes, figures; as JSON and as a table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from olive.evaluate.metrics import METRICS


@dataclass
class StepRecord:
    """One step of a run."""

    name: str
    key: str
    cached: bool
    seconds: float
    """Time in this run; a cached step takes almost none."""
    facts: dict[str, Any]
    reason: str = ""
    """Why it ran, or why it did not have to."""


@dataclass
class Report:
    """Everything a run has to say for itself."""

    workflow: dict[str, Any]
    output: str
    command: str = ""
    """The command line of the run."""
    started: str = ""
    """When the run began, in UTC."""
    steps: list[StepRecord] = field(default_factory=list)
    source_bytes: int = 0
    output_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file of the output."""
    verification: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """What the workflow's evaluators measured on the result."""
    metrics_source: dict[str, float] = field(default_factory=dict)
    """The same of the input model."""
    goals: list[dict[str, Any]] = field(default_factory=list)
    """``{goal, met, value, bound}`` of each goal; met and bound are None for a direction."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """``{number, state, values, metrics, feasible, reason, seconds, steps}`` of each trial of a search."""
    pareto: list[int] = field(default_factory=list)
    """Numbers of the trials that no other beats in every objective."""
    best: int | None = None
    """Number of the trial that became the output."""
    seconds: float = 0.0
    lock: dict[str, Any] = field(default_factory=dict)
    """What it takes to do the run again: the contents of the lock file."""

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data; a number that is not finite is null, since JSON has no other word for it."""
        data: dict[str, Any] = json.loads(json.dumps(_finite(asdict(self)), default=str))
        return data

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(self.as_data(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        """Yield the report as a few lines for a terminal."""
        for step in self.steps:
            yield f"{step.name:<12} {'cached' if step.cached else f'{step.seconds:.1f} s'}"
            fallbacks = all_fallbacks(step.facts)
            for name, what in list(fallbacks.items())[:4]:
                yield f"{'':<12} {name}: {what}"
            if len(fallbacks) > 4:
                yield f"{'':<12} and {len(fallbacks) - 4} more linear layers; the report lists them"
            yield from _candidates(step.facts.get("candidates") or [], step.facts.get("picked"))
            yield from _allocation(step.facts.get("allocation"))
            for name in FIGURES:
                if name in step.facts:
                    value = step.facts[name]
                    yield f"{'':<12} {name}: {value:.4f}" if isinstance(value, float) else f"{'':<12} {name}: {value}"
        yield f"{'size':<12} {self.source_bytes / 1e6:.1f} MB -> {self.output_bytes / 1e6:.1f} MB"
        yield from _figures("verified", self.verification or {"level": "none: not verified"})
        yield from self._measured()
        yield from self._searched()
        yield f"{'output':<12} {self.output}"

    def _measured(self) -> Iterator[str]:
        for i, (name, value) in enumerate(self.metrics.items()):
            source = self.metrics_source.get(name)
            compared = "" if source is None else f" (input {with_unit(name, source)})"
            yield f"{'' if i else 'metrics':<12} {name} {with_unit(name, value)}{compared}"
        for goal in self.goals:
            value = goal["value"]
            found = "" if value is None else f" ({with_unit(goal['goal'].split()[0], value)})"
            yield f"{GOAL_STATES[goal['met']]:<12} {goal['goal']}{found}"

    def _searched(self) -> Iterator[str]:
        if not self.trials:
            return
        states = Counter(trial["state"] for trial in self.trials)
        parts = ", ".join(f"{count} {state}" for state, count in states.items())
        best = "none meets the constraints" if self.best is None else f"best {self.best}"
        yield f"{'trials':<12} {len(self.trials)}: {parts}; {best}"
        front = [trial for trial in self.trials if trial["number"] in self.pareto]
        for i, trial in enumerate(front[:FRONT_LINES]):
            values = ", ".join(f"{name}={value}" for name, value in trial["values"].items())
            figures = ", ".join(f"{name} {with_unit(name, value)}" for name, value in trial["metrics"].items())
            yield f"{'' if i else 'Pareto front':<12} {trial['number']}: {figures} ({values})"
        if len(front) > FRONT_LINES:
            yield f"{'':<12} and {len(front) - FRONT_LINES} more trials on the front; the report lists them"


FIGURES = ("held_back_loss_before", "held_back_loss_after", "held_back_kl_before", "held_back_kl_after", "warning")
"""Facts of a step that a terminal shows."""
GOAL_STATES = {True: "goal met", False: "goal missed", None: "objective"}
FRONT_LINES = 8


def with_unit(metric: str, value: float) -> str:
    """Word a metric's value with its unit.

    >>> with_unit("size_on_disk", 5.1e6), with_unit("latency.latency_p50", 12.0), with_unit("my_score", 0.25)
    ('5.1 MB', '12 ms', '0.25')
    """
    known = METRICS.get(metric.rpartition(".")[2])
    unit = known.unit if known else ""
    if unit == "bytes":
        scale, name, digits = (1e9, "GB", 2) if value >= 1e9 else (1e6, "MB", 1) if value >= 1e6 else (1e3, "kB", 1)
        return f"{value / scale:.{digits}f} {name}"
    return f"{value:.4g} {unit}".rstrip()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def all_fallbacks(facts: dict[str, Any]) -> dict[str, str]:
    """Return by linear layer what was done instead of what was asked for: by its shape, or for lack of data."""
    starved = {name: own["fallback"] for name, own in facts.get("linears", {}).items() if "fallback" in own}
    return {**facts.get("fallbacks", {}), **starved}


def _candidates(rows: list[dict[str, Any]], picked: str | None) -> Iterator[str]:
    if rows:
        yield f"{'':<2}{'candidate':<24} {'perplexity':>11} {'KL':>9} {'top-1':>7} {'MB':>8} {'seconds':>8}"
    for row in rows:
        name = f"{'* ' if row['name'] == picked else '  '}{row['name']:<24}"
        if "not_done" in row:
            yield f"{name} {row['not_done']}"
            continue
        figures = f"{row['perplexity']:>11.3f} {row['kl_divergence']:>9.5f} {row['top1_agreement']:>7.4f}"
        yield f"{name} {figures} {row['bytes'] / 1e6:>8.1f} {row['seconds']:>8.1f}"


def _allocation(facts: dict[str, Any] | None) -> Iterator[str]:
    if not facts:
        return
    counts = Counter(unit["setting"] for unit in facts["units"].values())
    told = ", ".join(f"{setting} x {count}" for setting, count in sorted(counts.items()))
    yield f"{'':<12} bits:group size by unit: {told}"
    yield (
        f"{'':<12} {facts['bits_per_weight']:.3f} bits per weight, {facts['bytes'] / 1e6:.3f} MB ({facts['size_of']}); "
        f"KL {facts['kl_divergence']:.4g} on {facts['held_back_rows']} held-back rows, predicted "
        f"{facts['predicted_kl']:.4g}"
    )


def _figures(label: str, figures: dict[str, Any]) -> Iterator[str]:
    flat = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    if flat:
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items())
        yield f"{label:<12} {', '.join(parts)}"
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _figures(name, value)
