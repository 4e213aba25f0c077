"""A search: ask for points, try them in workers, tell the results in order, until there is a reason to stop.

Trial m is asked once the results of all trials up to m - n are told, n being the number of workers. So which points
are tried depends on the seed and on n, but not on which worker is faster.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olive.cache import Cache
from olive.config import seconds
from olive.engine import Progress, measured_source
from olive.errors import ConfigError, OliveError
from olive.goals import Judge, Verdict, metric_names, source_metrics
from olive.measure import basis
from olive.plan import check_places, open_source, plan, step_digest, version
from olive.search.journal import Journal, open_journal
from olive.search.pareto import best, front
from olive.search.samplers import Asked, Sampler, Tried, sampler
from olive.search.space import STAND_IN, Point, Space, fill, plain, read_space
from olive.search.trial import Task, Trial, has_parts, no_output
from olive.search.workers import Workers, open_workers
from olive.workflow import Search, Workflow, as_data, read_workflow

TRIALS = 100
INVALID = 1000
"""Combinations in a row that are not valid, after which a search ends."""


@dataclass
class Found:
    """What a search found."""

    trials: list[Trial]
    pareto: list[int]
    best: int | None
    ended: str
    """Why the search ended."""
    workflow: dict[str, Any] = field(default_factory=dict)
    """The best workflow, as plain data."""


def search(
    template: Mapping[str, Any], cache: Cache, *, where: str = "workflow", overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Found:  # fmt: skip
    """Search a template for the workflow that meets its goals best; trials go into the study's folder as they end."""
    space, head, output = prepare(template, cache, where=where, overwrite=overwrite)
    options = head.search or Search()
    journaling = open_journal(study_folder(head, output), about(template, head))
    with open_workers(options, progress) as workers, journaling as journal:
        study = Study(template, space, head, cache, journal, workers, progress)
        ended = study.run()
    return study.found(ended)


def prepare(
    template: Mapping[str, Any], cache: Cache, *, where: str = "workflow", overwrite: bool = False
) -> tuple[Space, Workflow, Path]:
    """Check all that a search needs; return its holes, its workflow with a stand-in for the passes, and the output."""
    space = read_space(template, where)
    head = read_workflow(dict(template) | {"passes": [STAND_IN]}, where)
    _check(head, head.search or Search(), space, where)
    _, _, inputs = open_source(head)
    output = check_places(head, inputs, cache, overwrite=overwrite)
    folder = study_folder(head, output)
    for place in (output, *inputs):
        if folder.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"{where}: search.study: {folder} lies in {place}; choose another folder")
    return space, head, output


def study_folder(head: Workflow, output: Path) -> Path:
    """Return where the trials are recorded."""
    own = head.search.study if head.search else None
    return Path(own).expanduser() if own else output.with_name(output.name + ".study")


def _check(head: Workflow, options: Search, space: Space, where: str) -> None:
    if not head.goals:
        raise ConfigError(f"{where}: goals: a search needs at least one, as in 'kl_divergence minimal'")
    endless = next((hole.path for hole in space.holes if hole.grid() is None), None)
    if options.sampler == "grid" and endless is not None:
        raise ConfigError(f"{where}: {endless}: a grid needs a step for this range, or a choice")
    if options.proxy is not None and not has_parts(head):
        raise ConfigError(
            f"{where}: search.proxy: no evaluator says how much data it uses; give it data with max_samples"
        )


def about(template: Mapping[str, Any], head: Workflow) -> dict[str, Any]:
    """What a study is of. Its limits and workers may change when it goes on."""
    options = head.search or Search()
    data = {key: value for key, value in template.items() if key not in ("search", "seed", "output_dir", "verify")}
    how = options.model_dump(include={"sampler", "order", "proxy"})
    measured = step_digest({name: basis(own) for name, own in head.evaluators.items()})
    return {
        "study": 1, "template": step_digest(data), "evaluators": measured, "seed": head.seed, **how,
        "optuna": version("optuna"),
    }  # fmt: skip


class Study:
    """The state of a search."""

    def __init__(
        self, template: Mapping[str, Any], space: Space, head: Workflow, cache: Cache, journal: Journal,
        workers: Workers, progress: Progress,
    ) -> None:  # fmt: skip
        self._template, self._space, self._head = template, space, head
        self._cache, self._journal, self._workers, self._progress = cache, journal, workers, progress
        self._options = head.search or Search()
        self._metrics = metric_names({name: own.metrics() for name, own in head.evaluators.items()})
        self._source: dict[str, float] | None = None if source_metrics(head.goals) else {}
        self._began = time.monotonic() - journal.seconds
        self._asked: list[Asked] = []
        self._tried = Tried(self._identity)
        self._trials: dict[int, Trial] = dict(journal.finished)
        self._told = 0
        self._verdicts: dict[int, Verdict] = {}
        self._invalid: set[int] = set()

    def run(self) -> str:
        """Run the search; return why it ended."""
        if self._options.order == "joint":
            return self._stage(self._space, self._limit(), 0)
        ended, stages = "", self._space.stages()
        for i, number in enumerate(stages):
            leader = self._best()
            values = self._trials[leader].values if leader is not None else {}
            left = (self._limit() - self._counted()) / (len(stages) - i)
            ended = self._stage(self._space.stage(number, values), self._counted() + left, i)
            if ended.startswith(("time", "goals")):
                break
        return ended

    def _limit(self) -> float:
        trials = self._options.trials
        return trials if trials is not None else math.inf if self._options.sampler == "grid" else TRIALS

    def _counted(self) -> int:
        return len(self._asked) - len(self._invalid)

    def _stage(self, space: Space, limit: float, stage: int) -> str:
        """Search one space; the number of trials may reach ``limit``."""
        objectives = len(self._judge_names())
        seed = self._head.seed + stage
        own = sampler(self._options.sampler, space, self._tried, seed=seed, objectives=objectives)
        ended, first = "", len(self._asked)
        while not ended:
            number = len(self._asked)
            noted = self._journal.asked.get(number)
            self._tell(own, first, noted["told"] if noted else max(self._told, number - self._workers.count + 1))
            if noted is None:
                ended = self._ended(limit)
            elif noted["stage"] != stage:
                ended = "before: this pass was done"
            if not ended and not self._ask(own, stage, noted):
                ended = "space: no combination is left that was not tried"
        self._tell(own, first, len(self._asked))
        return ended

    def _identity(self, point: Point) -> str:
        """Points that give the same workflow are one."""
        try:
            return plain(as_data(read_workflow(fill(self._template, self._space, point))))
        except ConfigError:
            return plain(point)

    def _ended(self, limit: float) -> str:
        if self._counted() >= limit:
            return f"trials: {self._counted()} were tried"
        if self._options.time is not None and self._seconds() >= seconds(self._options.time):
            return f"time: {self._options.time} are over"
        stop = self._options.stop_on_goals or not self._judge_names()
        if stop and any(verdict.met() for verdict in self._verdicts.values()):
            return "goals: a trial meets them"
        if len(self._asked) >= INVALID and all(n in self._invalid for n in range(self._told - INVALID, self._told)):
            return f"space: {INVALID} combinations in a row are not valid"
        return ""

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _ask(self, own: Sampler, stage: int, noted: dict[str, Any] | None) -> bool:
        """Get the next point and have it tried; False once there is none."""
        asked, number = own.ask(), len(self._asked)
        if asked is None:
            return False
        if noted is None:
            self._journal.ask(number, self._told, stage, asked.point, self._seconds())
        elif noted["values"] != asked.point:
            raise self._other(number)
        self._asked.append(asked)
        done = self._trials.get(number)
        task = self._task(number, asked.point)
        if isinstance(task, Trial):
            self._invalid.add(number)
            if done is None:
                self._finish(task)
        elif done is None:
            self._workers.submit(task)
        return True

    def _task(self, number: int, point: Point) -> Task | Trial:
        """Return the work of a trial, or the failed trial where the values are not valid together."""
        data = fill(self._template, self._space, point)
        try:
            workflow = read_workflow(data | {"output_dir": str(no_output(self._cache.root))})
            planned = plan(workflow, self._cache)
        except ConfigError as error:
            return Trial(number, point, reason=str(error))
        done = self._trials.get(number)
        if done is not None and done.steps and done.steps != [step.key for step in planned.steps]:
            raise self._other(number)
        if self._source is None:
            self._source = measured_source(planned, self._cache)
        rivals = [self._trials[n].proxy for n, verdict in self._verdicts.items() if verdict.feasible]
        return Task(
            number, point, as_data(workflow), str(self._cache.root), self._source, self._options.proxy,
            tuple(rival for rival in rivals if rival), self._cache.shared.url if self._cache.shared else None,
        )  # fmt: skip

    def _other(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self._journal.path}: trial {number} was made from another model, other data or by another version of "
            "olive or its libraries; delete the folder, or name another one in search.study"
        )

    def _tell(self, own: Sampler, first: int, upto: int) -> None:
        """Tell the sampler results, in the order of the trials, until ``upto`` are told."""
        while self._told < upto:
            number = self._told
            while number not in self._trials:
                for trial in self._workers.wait():
                    self._finish(trial)
            trial = self._trials[number]
            verdict = self._judged(trial)
            if number >= first:
                own.tell(self._asked[number], verdict)
            if verdict is not None:
                self._verdicts[number] = verdict
            self._told += 1

    def _finish(self, trial: Trial) -> None:
        self._judged(trial)
        self._trials[trial.number] = trial
        self._journal.finish(trial, self._seconds())
        said = ", ".join(f"{name} {value:.6g}" for name, value in trial.metrics.items()) or trial.reason
        logging.getLogger("olive").info("trial %d %s: %s (%s)", trial.number, trial.state, said, trial.values)
        limit = self._limit()
        total = min(limit, self._space.size() or math.inf)
        self._progress("trials", len(self._trials), int(total) if math.isfinite(total) else len(self._trials) + 1)

    def _judged(self, trial: Trial) -> Verdict | None:
        """Judge a complete trial; one whose figures cannot be judged has failed."""
        if trial.state != "complete":
            return None
        try:
            verdict = self._judge().judge(trial.metrics)
        except OliveError as error:
            trial.state, trial.reason = "failed", str(error)
            return None
        trial.feasible = verdict.feasible
        if not verdict.feasible:
            trial.reason = "misses " + ", ".join(goal for goal, far in verdict.violations.items() if far > 0)
        return verdict

    def _judge(self) -> Judge:
        return Judge(self._head.goals, self._metrics, self._source or {})

    def _judge_names(self) -> list[str]:
        goals = self._head.goals
        return [goal.metric for goal in goals if goal.is_objective()]

    def _candidates(self) -> dict[int, tuple[float, ...]]:
        return {number: verdict.objectives for number, verdict in self._verdicts.items() if verdict.feasible}

    def _best(self) -> int | None:
        return best(self._candidates())

    def found(self, ended: str) -> Found:
        """Return the trials in order, and the best of them."""
        trials = [self._trials[number] for number in sorted(self._trials)]
        leader = self._best()
        filled = fill(self._template, self._space, self._trials[leader].values) if leader is not None else {}
        return Found(trials, front(self._candidates()), leader, ended, filled)
