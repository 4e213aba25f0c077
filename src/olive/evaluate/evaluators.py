"""What an evaluator is (its options as fields, one method from a model on disk to numbers), and all of them by name."""

from __future__ import annotations

import getpass
import importlib
import math
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from olive.config import Config
from olive.errors import ConfigError, OliveError, did_you_mean
from olive.evaluate.metrics import METRICS, Metric
from olive.model import Model
from olive.target import Target

EVALUATORS = {
    "quality": "olive.evaluate.text:TextQuality",
    "accuracy": "olive.evaluate.accuracy:Accuracy",
    "lm_eval": "olive.evaluate.harness:LmEval",
    "speed": "olive.evaluate.speed:Speed",
    "latency": "olive.evaluate.latency:Latency",
    "memory": "olive.evaluate.memory:Memory",
    "size": "olive.evaluate.size:Size",
    "function": "olive.evaluate.function:Function",
}
LOCK = Path(tempfile.gettempdir()) / "olive-measuring.lock"
"""Held by whoever measures time: one measurement at a time on this machine."""


@dataclass(frozen=True)
class Measuring:
    """What a measurement may use besides the model."""

    source: Model | None = None
    """The model to compare with, usually the float one."""
    adapter: Path | None = None
    """The adapter that the measured model uses: a PEFT folder, or an ``.onnx_adapter`` file of an ONNX model."""
    source_adapter: Path | None = None
    """The adapter that the source uses."""
    target: Target = field(default_factory=Target)
    """Where the model will run."""
    compute_device: str = "cpu"
    """Where checkpoints are computed: ``cpu`` or ``cuda``."""
    seed: int = 0
    """Seed of everything random."""
    cache_dir: Path | None = None
    """Folder where results of checkpoints may be kept, so that the source is computed once for many candidates."""
    note: Callable[..., None] = lambda **_: None
    """``note(name=fact)`` records what is more than a metric: intervals, counts."""


class Evaluator(Config):
    """Base of every evaluator."""

    names: ClassVar[tuple[str, ...]] = ()
    """Built-in metrics that it may give; what it gives with its options, :meth:`metrics` says."""
    kinds: ClassVar[tuple[str, ...]] = ("hf", "onnx")
    """Kinds of model that it measures."""
    exclusive: ClassVar[bool] = False
    """It measures time: nothing else may be measured at once on the machine."""

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics that these options give, by name."""
        return {name: METRICS[name] for name in self.names}

    @abstractmethod
    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        """Return a number for each of the metrics, or raise."""


def evaluator_class(name: str, where: str = "evaluator") -> type[Evaluator]:
    """Return the class of an evaluator by its name."""
    if name not in EVALUATORS:
        raise ConfigError(f"{where}: unknown evaluator {name!r}{did_you_mean(str(name), EVALUATORS)}")
    module, _, attribute = EVALUATORS[name].partition(":")
    found: type[Evaluator] = getattr(importlib.import_module(module), attribute)
    return found


def evaluator_name(instance: Evaluator) -> str:
    """Return the name that an evaluator is registered under."""
    kind = type(instance)
    own = f"{kind.__module__}:{kind.__qualname__}"
    return next(name for name, place in EVALUATORS.items() if place == own)


def measured(evaluator: Evaluator, model: Model, ctx: Measuring) -> dict[str, float]:
    """Measure, alone on the machine where time is measured, and see that every metric has a finite number.

    A number that is missing or is not one is an error: it must never count as good, nor as bad.
    """
    name = evaluator_name(evaluator)
    if model.kind not in evaluator.kinds:
        raise ConfigError(
            f"{model.path}: {name} measures {' and '.join(evaluator.kinds)} models, and this is one of kind "
            f"{model.kind}; turn it into one with olive auto-opt first"
        )
    with _alone() if evaluator.exclusive else nullcontext():
        found = evaluator.measure(model, ctx)
    check(found, evaluator.metrics(), f"{name} of {model.path}")
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until nobody else on this machine measures time."""
    from filelock import FileLock

    try:
        lock = FileLock(LOCK, mode=0o666)
        lock.acquire()
    except PermissionError:  # a system may forbid to open what another user made in a folder for all
        lock = FileLock(LOCK.with_name(f"olive-measuring-{getpass.getuser()}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check(found: Mapping[str, float], metrics: Mapping[str, Metric], where: str) -> None:
    """Refuse results that lack a metric, have one too many, or hold something else than a finite number."""
    for metric in metrics:
        if metric not in found:
            raise OliveError(f"{where}: gave no {metric}, which it has to")
    for metric, value in found.items():
        if metric not in metrics:
            raise OliveError(f"{where}: gave {metric}, which is none of its metrics: {', '.join(metrics)}")
        if not math.isfinite(value):
            raise OliveError(f"{where}: {metric} is {value}, which is no measurement")
