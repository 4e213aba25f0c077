"""One trial: make a filled workflow's model, measure it, and say what came of it. Runs in a worker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from olive.cache import Cache
from olive.data.spec import DataSpec
from olive.engine import Progress, make
from olive.errors import OliveError
from olive.evaluate.evaluators import Evaluator, evaluator_name
from olive.fits import check
from olive.goals import Judge, metric_names
from olive.measure import Subject, beside_others, measure
from olive.plan import Plan, plan
from olive.search.pareto import far_behind
from olive.shared import Shared
from olive.workflow import Workflow, read_workflow

FAR = 0.5
"""On part of the data, a candidate is dropped that misses a hard goal by more than this, or is behind by it: relative
to the threshold and to the better trial."""


@dataclass
class Trial:
    """A point that was tried, and what came of it."""

    number: int
    values: dict[str, Any]
    state: str = "failed"
    """complete, failed or pruned"""
    metrics: dict[str, float] = field(default_factory=dict)
    feasible: bool = False
    reason: str | None = None
    """Why it failed, was dropped or is not feasible."""
    seconds: float = 0.0
    steps: list[str] = field(default_factory=list)
    """Keys of the steps that it is made of."""
    proxy: dict[str, float] = field(default_factory=dict)
    """Figures on part of the data."""

    def data(self) -> dict[str, Any]:
        """Return the trial as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What a worker needs for a trial; plain data, so that it can travel."""

    number: int
    values: dict[str, Any]
    workflow: dict[str, Any]
    """The filled workflow."""
    cache: str
    """Folder of the cache, which all workers share."""
    source: dict[str, float]
    """Figures of the input model."""
    proxy: float | None = None
    rivals: tuple[dict[str, float], ...] = ()
    """On part of the data: figures of the feasible trials before this one."""
    shared: str | None = None
    """URL of the shared cache, if there is one."""


def run_trial(task: Task, progress: Progress = lambda *_: None) -> Trial:
    """Do a trial. Whatever goes wrong in it is its result: a search goes on after a trial that failed."""
    trial = Trial(task.number, task.values)
    began = time.perf_counter()
    try:
        _run(task, trial, progress)
    except OliveError as error:
        trial.reason = str(error)
    except Exception as error:  # anything may fail in a model's code or a library, for want of memory not least
        trial.reason = f"{type(error).__name__}: {error}"
    trial.seconds = round(time.perf_counter() - began, 3)
    return trial


def _run(task: Task, trial: Trial, progress: Progress) -> None:
    cache = Cache(Path(task.cache), Shared(task.shared) if task.shared is not None else None)
    with cache.using():
        _run_in(cache, task, trial, progress)


def _run_in(cache: Cache, task: Task, trial: Trial, progress: Progress) -> None:
    workflow = read_workflow(task.workflow | {"output_dir": str(no_output(cache.root))}, "workflow")
    with beside_others():
        planned = plan(workflow, cache)
        check(planned, cache)
        trial.steps = [step.key for step in planned.steps]
        made = make(planned, cache, progress)
        subject = Subject(made.model, made.key(), planned)
        if task.proxy is not None:
            trial.proxy = measure(on_part(workflow.evaluators, task.proxy), subject, cache)
            reason = hopeless(planned, trial.proxy, task)
            if reason is not None:
                trial.state, trial.reason = "pruned", reason
                return
        shared = {name: own for name, own in workflow.evaluators.items() if not own.exclusive}
        trial.metrics = measure(shared, subject, cache)
    timed = {name: own for name, own in workflow.evaluators.items() if own.exclusive}
    trial.metrics |= measure(timed, subject, cache)
    trial.state = "complete"


def no_output(cache_root: Path) -> Path:
    """Return an output for workflows that lay nothing out: a place that is free and may be written."""
    return cache_root / "trials" / "none"


def on_part(evaluators: Mapping[str, Evaluator], fraction: float) -> dict[str, Evaluator]:
    """Return what is measured first: evaluators whose data says how much of it is used, on a fraction of it, and those
    that cost nothing."""
    found = {}
    for name, evaluator in evaluators.items():
        data = getattr(evaluator, "data", None)
        if isinstance(data, DataSpec) and data.max_samples:
            part = data.model_copy(update={"max_samples": max(1, round(data.max_samples * fraction))})
            found[name] = evaluator.model_copy(update={"data": part})
        elif evaluator_name(evaluator) == "size":
            found[name] = evaluator
    return found


def has_parts(workflow: Workflow) -> bool:
    """Tell whether an evaluator can be measured on part of its data."""
    return any(own != workflow.evaluators[name] for name, own in on_part(workflow.evaluators, 0.5).items())


def hopeless(planned: Plan, figures: Mapping[str, float], task: Task) -> str | None:
    """Tell why a candidate need not be measured in full, or None: it is far from a hard goal, or nowhere better than
    an earlier trial and somewhere far behind it."""
    workflow = planned.workflow
    names = metric_names({name: own.metrics() for name, own in workflow.evaluators.items()})
    known = [goal for goal in workflow.goals if goal.metric in figures]
    judge = Judge(known, names, task.source)
    verdict = judge.judge(figures)
    part = f"on {task.proxy:.0%} of the data"
    for row in verdict.rows:
        if verdict.violations.get(row["goal"], 0) > FAR:
            return f"{row['goal']}: is {row['value']:.4g} {part}, which is far off"
    if len(known) < len(workflow.goals):
        return None  # what is not known yet may be where it is better
    better = far_behind(verdict.objectives, _objectives(judge, task.rivals), FAR)
    if better is None:
        return None
    return f"{', '.join(judge.objectives())}: far behind an earlier trial {part}"


def _objectives(judge: Judge, rivals: Sequence[Mapping[str, float]]) -> list[tuple[float, ...]]:
    return [judge.judge(rival).objectives for rival in rivals]
