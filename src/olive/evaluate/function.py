"""A function of the user's as an evaluator."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.metrics import Direction, Metric
from olive.model import Model


class Function(Evaluator):
    """Call a Python function with the model (its ``path``, ``kind`` and ``adapters``); it returns a number."""

    file: str = Field(min_length=1)
    """Python file that holds the function."""
    function: str = Field(min_length=1)
    """Name of the function; the metric is called the same."""
    direction: Direction
    """Whether less is better (minimize) or more is (maximize)."""
    unit: str = ""
    """Unit of the number."""

    def metrics(self) -> dict[str, Metric]:
        help = f"{self.function} of {Path(self.file).name}"
        return {self.function: Metric(self.function, self.direction, self.unit, help)}

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:  # noqa: ARG002
        function = self._load()
        try:
            value = function(model)
        except Exception as error:  # whatever a user's code may raise
            kind = type(error).__name__
            raise OliveError(f"{self.file}: {self.function} failed on {model.path}: {kind}: {error}") from error
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise OliveError(f"{self.file}: {self.function} must return a number, got {value!r:.80}")
        return {self.function: float(value)}

    def _load(self) -> Any:
        path = Path(self.file)
        if not path.is_file():
            raise ConfigError(f"{path}: no such Python file")
        spec = importlib.util.spec_from_file_location(f"olive_function_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path}: not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's code may raise
            raise ConfigError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
        found = getattr(module, self.function, None)
        if not callable(found):
            have = ", ".join(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
            raise ConfigError(f"{path}: has no function {self.function}; it has: {have or 'none'}")
        return found
