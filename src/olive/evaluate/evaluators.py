"""Evaluators: what is measured of a model, and how."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from olive.config import Config
from olive.errors import ConfigError, did_you_mean
from olive.evaluate.metrics import Metric
from olive.model import Model
from olive.target import Target


@dataclass(frozen=True)
class Measuring:
    """What an evaluator may use besides the model."""

    source: Model | None
    """The float model to compare with."""
    target: Target
    """Where the finished model will run."""
    compute_device: str
    """Where checkpoints compute."""
    seed: int
    """Seed of everything random."""
    cache_dir: Path | None
    """Folder for what can be kept, as the source's logits."""


class Evaluator(Config):
    """Base of every evaluator."""

    exclusive: ClassVar[bool] = False
    """It measures speed: nothing else may run on the machine meanwhile."""

    def metrics(self) -> dict[str, Metric]:
        """Return what :meth:`measure` will return figures for."""
        raise NotImplementedError

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        """Measure a model; raises where it cannot."""
        raise NotImplementedError


EVALUATORS = {
    "quality": "olive.evaluate.text:Quality",
    "size": "olive.evaluate.size:Size",
}


def evaluator_class(name: str, where: str = "evaluator") -> type[Evaluator]:
    """Return the class of an evaluator by its name."""
    if name not in EVALUATORS:
        raise ConfigError(f"{where}: unknown evaluator {name!r}{did_you_mean(str(name), EVALUATORS)}")
    module, _, attribute = EVALUATORS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def evaluator_name(instance: Evaluator) -> str:
    """Return the name that an evaluator is registered under."""
    kind = type(instance)
    own = f"{kind.__module__}:{kind.__qualname__}"
    return next(name for name, place in EVALUATORS.items() if place == own)
