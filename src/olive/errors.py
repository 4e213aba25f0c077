"""Errors that a user can act on, each with the exit code of the command that ends with it.

Exit codes: 0 done, 1 the run failed, 2 the input was at fault, 3 verification failed or a reproduced file differs, 130
interrupted.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class OliveError(Exception):
    """Something a user can mend; the message says where, what was given, what is allowed, what to do."""

    exit_code = 1


class ConfigError(OliveError):
    """The input is at fault: a flag, a workflow, a file, a model."""

    exit_code = 2


class PassError(OliveError):
    """A pass could not do its work although its input was right."""


class VerifyError(OliveError):
    """A produced model failed its checks, or is not what its lock says."""

    exit_code = 3


class MissingDependency(OliveError):
    """An optional package is not installed."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest allowed name, else the list of allowed names."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependency(f"{module} is not installed; run: pip install 'olive-onnx[{extra}]'") from None
