"""Searches whose trials are computed from their values by a function, in place of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olive.cache import Cache
from olive.search.journal import open_journal
from olive.search.space import STAND_IN, read_space
from olive.search.study import Found, Study, about
from olive.search.trial import Task, Trial
from olive.workflow import read_workflow

Figures = Callable[[dict[str, Any]], dict[str, float] | str]
"""Metrics by values; a text is the reason of a failure."""


class Stop(Exception):
    """Stands for a kill."""


class Fake:
    """Workers that compute figures; the newest task is finished first."""

    def __init__(self, figures: Figures, count: int = 1, stop_after: int | None = None) -> None:
        self.figures, self.count, self.stop_after = figures, count, stop_after
        self.tasks: list[Task] = []
        self.done: list[int] = []
        """Numbers of the trials in the order they were finished."""

    def submit(self, task: Task) -> None:
        self.tasks.append(task)
        assert len(self.tasks) <= self.count

    def wait(self) -> list[Trial]:
        if len(self.done) == self.stop_after:
            raise Stop
        task = self.tasks.pop()
        found = self.figures(task.values)
        self.done.append(task.number)
        if isinstance(found, str):
            return [Trial(task.number, task.values, "failed", reason=found)]
        return [Trial(task.number, task.values, "complete", dict(found))]


def template(model: Path, *passes: Any, goals: list[Any], seed: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "input_model": {"path": str(model)},
        "passes": list(passes),
        "goals": goals,
        "search": options,
        "seed": seed,
        "output_dir": "out",
    }


def run(data: dict[str, Any], workers: Fake, folder: Path) -> Found:
    """Run a search with these workers; ``folder`` holds the study and the cache."""
    head = read_workflow(data | {"passes": [STAND_IN]})
    with open_journal(folder / "study", about(data, head)) as journal:
        study = Study(data, read_space(data), head, Cache(folder / "cache"), journal, workers, lambda *_: None)
        return study.found(study.run())
