"""The recipes that come with Olive: workflow files without a model, and templates to search over.

The first line of a recipe says what it is for. ``olive run NAME`` runs one on a model; ``olive auto-opt --goal`` picks
a template by its target.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.config import load
from olive.errors import ConfigError, did_you_mean
from olive.target import Target

FOLDER = Path(__file__).parent
SEARCHES = {
    ("cpu", "float"): "cpu-search",
    ("cpu", "fixed"): "cpu-search-graph",
    ("gpu", "float"): "gpu-search",
    ("gpu", "fixed"): "gpu-search-graph",
}
"""The template by the target's device, and by whether the checkpoint may be quantized or is fixed."""


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str) -> dict[str, Any]:
    """Return a recipe as the plain data of a workflow file."""
    data: dict[str, Any] = load(_file(name))
    return data


def _file(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise ConfigError(f"{name}: no recipe is called so{did_you_mean(name, names())}")
    return path


def template(target: Target, *, fixed: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template for a target. ``fixed``: the checkpoint cannot be quantized, being so already or having an
    adapter. ``options`` of the decoder pass are no holes any more; an int precision also holds for the quantizers."""
    precision = str(options.get("precision", ""))
    whole = precision in ("fp32", "fp16")
    data = copy.deepcopy(recipe(SEARCHES[target.device, "fixed" if fixed or whole else "float"]))
    data["target"] = target.model_dump(mode="json", exclude_none=True)
    own = dict(options)
    if precision.startswith("int") and not fixed:
        own.pop("precision")
        bits = int(precision.removeprefix("int"))
        for step in data["passes"][0]:
            if step is not None:
                step["bits"] = bits
        data["passes"][0] = [step for step in data["passes"][0] if step is not None]
    data["passes"][-1] |= own
    return data
