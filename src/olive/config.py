"""Strict, frozen configuration objects, and reading and writing them as YAML or JSON.

Every option is a field with a docstring; flags, help and reference pages are generated from those fields.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from olive.errors import ConfigError, did_you_mean


class Config(BaseModel):
    """A frozen set of options; an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: Any, where: str) -> C:
    """Validate ``data`` as ``cls``; all mistakes are reported at once, each with its place: ``where`` and the field's
    path (``passes.0.`` and ``bits``)."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where.rstrip('. :')}: expected a mapping of options, got {data!r}")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_say(cls, item, where) for item in error.errors()]
    raise ConfigError("\n".join(lines))


def mistakes(cls: type[Config], data: dict[str, Any], where: str) -> list[tuple[tuple[int | str, ...], str]]:
    """Return each mistake that :func:`parse` would report, with the path of its field; options that fit one by one
    but not together have the path of what holds them, often ``()``."""
    try:
        cls.model_validate(data)
    except ValidationError as error:
        return [(item["loc"], _say(cls, item, where)) for item in error.errors()]
    return []


def seconds(time: str) -> float:
    """Return the seconds of a time as in 90s, 10m or 2h.

    >>> seconds("1.5m")
    90.0
    """
    return float(time[:-1]) * {"s": 1, "m": 60, "h": 3600}[time[-1]]


def _a_time(value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[smh]", value):
        raise ValueError("give a number and a unit, as in 90s, 10m or 2h")
    return value


Time = Annotated[str, AfterValidator(_a_time)]
"""A time to spend, as in 90s, 10m or 2h."""


def _say(cls: type[BaseModel], item: Any, where: str) -> str:
    path = (where + ".".join(str(part) for part in item["loc"])).rstrip(". :")
    if item["type"] == "extra_forbidden":
        owner = _owner(cls, item["loc"][:-1])
        return f"{path}: unknown option{did_you_mean(str(item['loc'][-1]), owner.model_fields)}"
    if item["type"] == "missing":
        return f"{path}: required, but not given"
    if item["type"] == "model_type":
        names = ", ".join(_owner(cls, item["loc"]).model_fields)
        return f"{path}: expected a mapping of options ({names}), got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower() + message[1:]}, got {item['input']!r}"


def _owner(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model class that holds the field at ``loc``, as far as plain annotations tell."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        if field is None:
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                cls = kind
    return cls


def load(path: Path) -> Any:
    """Read a YAML or JSON file; a syntax error, or a key that is given twice, names its place."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_no_twins)
        return read_yaml(text)
    except _GivenTwiceError as error:
        raise ConfigError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from None


class _GivenTwiceError(ValueError):
    """A key of a JSON mapping is given twice: one of its values would be lost."""


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _GivenTwiceError(f"{key!r} is given twice in one mapping")
        found[key] = value
    return found


def read_yaml(text: str) -> Any:
    """Read YAML with the numbers of version 1.2: 1e-3 is a number, and 8:32 is text, not 512."""
    import yaml

    return yaml.load(text, Loader=_yaml_classes()[0])


def dump(data: Any) -> str:
    """Write plain data as YAML, keys in the order given."""
    import yaml

    return yaml.dump(data, Dumper=_yaml_classes()[1], sort_keys=False, allow_unicode=True, width=120)


@cache
def _yaml_classes() -> tuple[Any, Any]:
    """Return PyYAML's safe loader with 1.2's numbers, and a dumper that quotes text which is a number in 1.1 or 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            open_anchor = self.check_event(yaml.AliasEvent) and self.anchors.get(self.peek_event().anchor)
            if open_anchor and open_anchor.end_mark is None:
                raise yaml.MarkedYAMLError(
                    problem="an alias of what holds it", problem_mark=self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        problem = f"{key.value!r} is given twice in one mapping"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                    seen.add((key.tag, key.value))
            return node

    class Dumper(yaml.SafeDumper):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in ("int", "float")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    whole = re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$")
    number = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)$|\.nan$")
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("-+0123456789"))
        kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader, Dumper
