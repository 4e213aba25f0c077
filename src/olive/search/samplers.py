"""What to try next: Optuna's samplers behind ask and tell, without a point twice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from olive.goals import Verdict
from olive.search.space import Choice, Hole, Point, Space, plain

if TYPE_CHECKING:
    import optuna

REDRAWS = {"gp": 3}
REDRAWS_ELSE = 24
"""Draws of points that were tried before, until an untried one is taken; a Gaussian process insists on its best."""
LISTED = 4096
"""Spaces of at most this many points are listed to find the untried ones."""
STARTUP, GP_STARTUP = 8, 6
"""Random trials before TPE, and a Gaussian process, begins."""


@dataclass(frozen=True)
class Asked:
    """A point to try, and what its sampler needs to hear of it again."""

    point: Point
    trial: Any = None


class Sampler(Protocol):
    """Proposes points, and learns from what became of them."""

    def ask(self) -> Asked | None:
        """Return a point that was not asked before, or None once the space is spent."""

    def tell(self, asked: Asked, verdict: Verdict | None) -> None:
        """Learn how a point was judged; None: it failed or was dropped."""


class Tried:
    """The points that were asked; those of the same identity count as one."""

    def __init__(self, identity: Callable[[Point], str]) -> None:
        self._identity = identity
        self._known: dict[str, str] = {}
        self._tried: set[str] = set()

    def name(self, point: Point) -> str:
        """Return the identity of a point."""
        key = plain(point)
        if key not in self._known:
            self._known[key] = self._identity(point)
        return self._known[key]

    def add(self, point: Point) -> bool:
        """Take a point down; False if it was there."""
        count = len(self._tried)
        self._tried.add(self.name(point))
        return len(self._tried) > count

    def __contains__(self, point: Point) -> bool:
        return self.name(point) in self._tried


def sampler(name: str, space: Space, tried: Tried, *, seed: int, objectives: int) -> Sampler:
    """Make a sampler by its name; it asks for nothing that was tried."""
    if name == "grid":
        return Grid(space, tried)
    return Optuna(name, space, tried, seed=seed, objectives=objectives)


class Grid:
    """Every point in order."""

    def __init__(self, space: Space, tried: Tried) -> None:
        self._points: Iterator[Point] = space.points()
        self._tried = tried

    def ask(self) -> Asked | None:
        return next((Asked(point) for point in self._points if self._tried.add(point)), None)

    def tell(self, asked: Asked, verdict: Verdict | None) -> None:
        """The order is fixed."""


class Optuna:
    """A study in memory; equal seeds, asks and tells give equal points."""

    def __init__(self, name: str, space: Space, tried: Tried, *, seed: int, objectives: int) -> None:
        import optuna

        self._space, self._tried = space, tried
        self._redraws = REDRAWS.get(name, REDRAWS_ELSE)
        self._random = random.Random(seed)
        self._best: tuple[tuple[float, tuple[float, ...]], Point] | None = None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # TPE's group, GP
            own = _optuna_sampler(name, seed)
        self._study = optuna.create_study(directions=["minimize"] * max(1, objectives), sampler=own)

    def ask(self) -> Asked | None:
        for _ in range(self._redraws):
            asked = self._draw()
            if asked is not None:
                return asked
        untried = self._untried()
        if not untried:
            return None
        point = self._random.choice(self._nearest(untried))
        params = {hole.path: _to_param(hole, point[hole.path]) for hole in self._open(point)}
        self._study.enqueue_trial(params)
        return self._draw()

    def _draw(self) -> Asked | None:
        import optuna

        trial = self._study.ask()
        point = self._space.draw(lambda hole: _suggest(trial, hole))
        if self._tried.add(point):
            return Asked(point, trial)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the samplers leave these out
        return None

    def _open(self, point: Point) -> list[Hole]:
        return [hole for hole in self._space.holes if hole.path in point and hole.path not in self._space.fixed]

    def _untried(self) -> list[Point]:
        size = self._space.size()
        if size is None or size > LISTED:
            return []
        return [point for point in self._space.points() if point not in self._tried]

    def _nearest(self, points: list[Point]) -> list[Point]:
        """Return those that share most values with the best point so far."""
        if self._best is None:
            return points
        best = self._best[1].items()
        shared = [sum(path in point and point[path] == value for path, value in best) for point in points]
        return [point for point, count in zip(points, shared, strict=True) if count == max(shared)]

    def tell(self, asked: Asked, verdict: Verdict | None) -> None:
        import optuna

        if verdict is None:  # counts as worse than what is complete
            self._study.tell(asked.trial, state=optuna.trial.TrialState.PRUNED)
            return
        rank = sum(verdict.violations.values()), verdict.objectives if verdict.feasible else ()
        if self._best is None or rank < self._best[0]:
            self._best = rank, asked.point
        for goal, violation in verdict.violations.items():
            asked.trial.set_constraint(goal, violation)
        self._study.tell(asked.trial, list(verdict.objectives) or [sum(verdict.violations.values())])


def _optuna_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    match name:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=GP_STARTUP, deterministic_objective=True)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=16)
        case "qmc":
            quiet = {"warn_asynchronous_seeding": False, "warn_independent_sampling": False}
            return optuna.samplers.QMCSampler(seed=seed, scramble=True, **quiet)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP, multivariate=True, group=True, constant_liar=True
    )


def _ordered(hole: Choice) -> list[Any] | None:
    """Return the values of a choice among numbers in their order: the sampler may learn that neighbours are alike."""
    numbers = all(type(value) in (int, float) for value in hole.values)
    return sorted(hole.values) if numbers else None


def _suggest(trial: optuna.Trial, hole: Hole) -> Any:
    if isinstance(hole, Choice):
        ordered = _ordered(hole)
        if ordered is not None:
            return ordered[trial.suggest_int(hole.path, 0, len(ordered) - 1)]
        return hole.values[trial.suggest_categorical(hole.path, range(len(hole.values)))]
    if hole.whole:
        return trial.suggest_int(hole.path, int(hole.low), int(hole.high), log=hole.log, step=int(hole.step or 1))
    return trial.suggest_float(hole.path, hole.low, hole.high, log=hole.log, step=hole.step)


def _to_param(hole: Hole, value: Any) -> Any:
    if not isinstance(hole, Choice):
        return value
    return (_ordered(hole) or list(hole.values)).index(value)
