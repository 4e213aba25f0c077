"""Measure a made model with a workflow's evaluators."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olive.cache import Cache
from olive.data.rows import fingerprint
from olive.data.spec import DataSpec
from olive.evaluate.evaluators import Evaluator, Measuring, evaluator_name, measured
from olive.goals import metric_names
from olive.model import Model, sha256
from olive.plan import Plan, code_digest, step_digest, version

REMEMBERED = ("quality", "accuracy", "size")
"""Evaluators whose figures depend on the models, their options and data alone, so that they are kept in the cache."""
CODE = ("olive.evaluate", "olive.runtime", "olive.data", "olive.quant", "olive.decoder")
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its key, and the plan that made it: its input model is what to compare with."""

    model: Model
    key: str
    plan: Plan


def measure(evaluators: Mapping[str, Evaluator], subject: Subject, cache: Cache) -> dict[str, float]:
    """Return the figures of some of the workflow's evaluators, by the names that goals use."""
    workflow = subject.plan.workflow
    adapters = list(subject.model.adapters.values())
    measuring = Measuring(
        source=subject.plan.source,
        adapter=adapters[0] if len(adapters) == 1 else None,
        target=workflow.target,
        compute_device=subject.plan.compute_device,
        seed=workflow.seed,
        cache_dir=cache.root / "measuring",
    )
    found: dict[str, dict[str, float]] = {}
    for name, evaluator in evaluators.items():
        if evaluator.exclusive:
            with alone():
                found[name] = measured(evaluator, subject.model, measuring)
        elif evaluator_name(evaluator) in REMEMBERED:
            found[name] = _remembered(evaluator, subject, measuring, cache)
        else:
            found[name] = measured(evaluator, subject.model, measuring)
    names = metric_names({name: evaluator.metrics() for name, evaluator in workflow.evaluators.items()})
    return {
        metric if metric in names else f"{name}.{metric}": value
        for name, figures in found.items()
        for metric, value in figures.items()
    }


def _remembered(evaluator: Evaluator, subject: Subject, measuring: Measuring, cache: Cache) -> dict[str, float]:
    parts = basis(evaluator) | {
        "model": subject.key,
        "source": subject.plan.source_key,
        "seed": measuring.seed,
        "device": subject.plan.compute_device,
    }
    key = step_digest(parts)
    with cache.lock(key):
        known = cache.get(key)
        if known is None:
            facts = measured(evaluator, subject.model, measuring)
            with cache.stage(key) as staged:
                known = cache.put(key, staged, {"pass": "measure", "facts": facts, "files": {}})
    return dict(known.record["facts"])


def basis(evaluator: Evaluator) -> dict[str, Any]:
    """Return what decides an evaluator's figures, the models aside."""
    values = {name: getattr(evaluator, name) for name in type(evaluator).model_fields}
    data = {name: value for name, value in values.items() if isinstance(value, DataSpec)}
    own = [Path(text) for text in (values.get("file"), *values.get("tasks", ())) if text]
    return {
        "evaluator": evaluator_name(evaluator),
        "options": evaluator.model_dump(mode="json", exclude={name: {"files"} for name in data}),
        "data": {name: fingerprint(spec) for name, spec in data.items()},
        "files": [sha256(file) for file in own if file.is_file()],
        "code": [code_digest(name) for name in CODE],
        "versions": [version(name) for name in LIBRARIES],
    }


@contextmanager
def beside_others() -> Iterator[None]:
    """Compute while others on this machine may do so too, but while nobody measures speed."""
    with _machine_lock().read_lock():
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Measure speed while no trial on this machine computes."""
    with _machine_lock().write_lock():
        yield


def _machine_lock() -> Any:
    from filelock import ReadWriteLock

    return ReadWriteLock(Path(tempfile.gettempdir()) / f"olive-computing-{os.getuid()}.db")
