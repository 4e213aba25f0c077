"""Assignments to a workflow file's plain data: ``passes.awq.bits=8``.

A pass is named by its type or by its index; what stands in a path is checked against the fields that may be there, so
that a mistake is reported with its place and the nearest names before the workflow is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from olive.config import Config, read_yaml
from olive.data.spec import DataSpec
from olive.errors import ConfigError, did_you_mean
from olive.passes import PASSES, pass_class
from olive.workflow import Workflow


def assign(data: Any, assignments: Iterable[str], flag: str = "--set") -> Any:
    """Return a copy of a workflow's data with the assignments made, in order."""
    data = copy.deepcopy(data)
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"{flag} {text}: give PATH=VALUE, as in passes.awq.bits=8")
        if not isinstance(data, dict):
            raise ConfigError(f"{flag} {text}: the workflow is not a mapping")
        _put(data, path.split("."), _value(value, f"{flag} {text}"), f"{flag} {path}")
    return data


def _value(text: str, where: str) -> Any:
    import yaml

    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: the value is not YAML: {getattr(error, 'problem', None) or error}") from None


def _put(data: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    first, rest = path[0], path[1:]
    _known(first, [*Workflow.model_fields, "data"], where)
    if not rest:
        data[first] = value
    elif first == "passes":
        step, rest = _find_pass(data.get("passes"), rest, where)
        _in_options(step, pass_class(str(step.get("type")), where), rest, value, where)
    elif first == "data":
        sets = data.setdefault("data", {})
        _known(rest[0], sets, where)
        _in_options(sets[rest[0]], DataSpec, rest[1:], value, where)
    else:
        _in_options(data, Workflow, path, value, where)


def _find_pass(steps: Any, path: list[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the pass that the head of ``path`` names, and the rest of the path."""
    if not isinstance(steps, list):
        raise ConfigError(f"{where}: the workflow has no list of passes")
    name, rest = path[0], path[1:]
    if name.isdigit():
        step = _at(steps, name, where)
        if isinstance(step, list):  # alternatives: by index or type among themselves
            if not rest:
                raise ConfigError(f"{where}: passes.{name} is a list of alternatives; name one of them")
            return _find_pass(step, rest, where)
        return _is_pass(step, where), _needed(rest, where)
    flat = [(f"{i}", step) for i, step in enumerate(steps) if not isinstance(step, list)]
    flat += [(f"{i}.{j}", s) for i, step in enumerate(steps) if isinstance(step, list) for j, s in enumerate(step)]
    typed = [(place, step) for place, step in flat if isinstance(step, dict) and step.get("type")]
    found = [(place, step) for place, step in typed if step["type"] == name]
    if not found:
        there = [str(step["type"]) for _, step in typed]
        hint = "" if name in PASSES else did_you_mean(name, there)
        raise ConfigError(f"{where}: no pass of this workflow has type {name!r}{hint or did_you_mean(name, there)}")
    if len(found) > 1:
        places = ", ".join(f"passes.{place}" for place, _ in found)
        raise ConfigError(f"{where}: {len(found)} passes have type {name!r}; give the index: {places}")
    return found[0][1], _needed(rest, where)


def _needed(rest: list[str], where: str) -> list[str]:
    if not rest:
        raise ConfigError(f"{where}: name an option of the pass too, as in passes.awq.bits")
    return rest


def _at(items: list[Any], index: str, where: str) -> Any:
    if int(index) >= len(items):
        raise ConfigError(f"{where}: there is no item {index}; the last is {len(items) - 1}")
    return items[int(index)]


def _is_pass(step: Any, where: str) -> dict[str, Any]:
    if not isinstance(step, dict) or "type" not in step:
        raise ConfigError(f"{where}: expected a pass with a type there, got {step!r}")
    return step


def _in_options(options: Any, kind: type[Config] | None, path: list[str], value: Any, where: str) -> None:
    """Set what ``path`` names in some options of ``kind``."""
    if isinstance(options, str):
        raise ConfigError(f"{where}: is the name {options!r} there; set data.{options}.{'.'.join(path)} instead")
    if not path:
        raise ConfigError(f"{where}: name an option too; allowed: {', '.join(kind.model_fields if kind else ())}")
    name, rest = path[0], path[1:]
    if isinstance(options, list):
        if not name.isdigit():
            raise ConfigError(f"{where}: {name!r}: a list is there; give an index from 0")
        item = _at(options, name, where)
        if rest:
            _in_options(item, None, rest, value, where)
        else:
            options[int(name)] = value
        return
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: {options!r} is there, which has no option {name!r}")
    if kind is not None:
        _known(name, [*kind.model_fields, *(["type"] if "type" in options else [])], where)
    if not rest:
        options[name] = value
        return
    annotation = kind.model_fields[name].annotation if kind is not None and name in kind.model_fields else None
    inner = next((part for part in (annotation, *get_args(annotation)) if _is_config(part)), None)
    if get_origin(annotation) is dict and not any(_is_config(part) for part in _parts(annotation)):
        options.setdefault(name, {})[".".join(rest)] = value  # keys of free mappings may hold dots: *.down_proj
    else:
        if options.get(name) is None:
            options[name] = {}
        _in_options(options[name], inner, rest, value, where)


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


def _is_config(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Config)


def _known(name: str, allowed: Iterable[str], where: str) -> None:
    allowed = list(allowed)
    if name not in allowed:
        raise ConfigError(f"{where}: unknown name {name!r}{did_you_mean(name, allowed)}")
