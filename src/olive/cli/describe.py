"""What a pass or another part of a workflow is, as words: from the fields' types, limits, defaults and help."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from olive.config import Config
from olive.data.spec import DataSpec
from olive.passes import PASSES, pass_class

WIDTH = 100
WORDS: dict[type, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}
LIMITS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def table() -> Iterator[str]:
    """Yield a line for each pass."""
    width = max(map(len, PASSES)) + 2
    for name in PASSES:
        kind = pass_class(name)
        first = re.split(r"\.(?= [A-Z])", one_line(inspect.cleandoc(kind.__doc__ or "")))[0].rstrip(".")
        flow = f"{' or '.join(kind.accepts)} -> {kind.produces}"
        yield from textwrap.wrap(f"{name:<{width}}{first} ({flow})", WIDTH, subsequent_indent=" " * width)


def explain(name: str) -> Iterator[str]:
    """Yield what a pass does, what it takes and gives, and its options."""
    kind = pass_class(name, "olive passes")
    yield name
    for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        yield from ("", *textwrap.wrap(one_line(part), WIDTH))
    yield from ("", f"Accepts: {', '.join(kind.accepts)}. Produces: {kind.produces}.")
    if kind.targets:
        yield f"Builds for: {', '.join(kind.targets)}."
    yield from ("", "options:" if kind.model_fields else "No options.")
    yield from _options(kind)
    if "data" in kind.model_fields:
        yield from ("", "data has these options (or is the name of a data set of the workflow):")
        yield from _options(DataSpec)


def _options(kind: type[Config]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else default_of(field.get_default(call_default_factory=True))
        said = f"{type_of(field.annotation)}{limits(field.metadata)}; {default}"
        yield f"  {name} ({said})"
        yield from textwrap.wrap(
            one_line(field.description or ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )


def one_line(text: str) -> str:
    """Return a text without line breaks and double backticks."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`")


def type_of(kind: Any, names: dict[type, str] = WORDS) -> str:
    """Return the words for a field's type; ``names`` has those for classes."""
    if kind in names:
        return names[kind]
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if get_origin(kind) is tuple:
        return f"list of {type_of(parts[0], names)}"
    if get_origin(kind) is dict:
        return "options by name"
    if isinstance(kind, type) and issubclass(kind, Config):
        return "options"
    # a union, or a type with annotations that are no types
    return " or ".join(type_of(part, names) for part in parts if isinstance(part, type) or get_origin(part))


def limits(metadata: list[Any]) -> str:
    """Return the limits of a field's value, each after a comma."""
    found = [(word, getattr(item, name, None)) for item in metadata for name, word in LIMITS]
    return "".join(f", {word} {value}" for word, value in found if value is not None)


def default_of(value: Any) -> str:
    """Return the words for a field's default."""
    if value is None or value in ((), {}):
        return "none by default"
    if isinstance(value, Config):
        return "its defaults by default"
    return f"`{str(value).lower() if isinstance(value, bool) else value}` by default"
