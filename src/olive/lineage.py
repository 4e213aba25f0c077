"""Why a step has the key that it has, and what sets it apart from the entries that the cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from olive.inventory import Item

ORDER = ("pass", "options", "data", "folders", "seed", "device", "target", "trust_remote_code", "input", "versions",
         "code")  # fmt: skip
"""Parts of a key, what a user decides first."""


@dataclass(frozen=True)
class Difference:
    """A part of the key that differs."""

    part: str
    here: Any
    there: Any

    def __str__(self) -> str:
        if self.part.startswith("code."):
            return f"the code of {self.part.removeprefix('code.')} differs"
        if self.part.startswith("data."):
            return f"the contents of {self.part} differ"
        if self.part.startswith("folders."):
            return f"the contents of folder {self.part.removeprefix('folders.')} differ"
        if self.part == "input":
            return "the input differs"
        return f"{self.part} is {_say(self.here)}, there {_say(self.there)}"


class _Nothing:
    """A part that the other key lacks."""

    def __str__(self) -> str:
        return "not given"


NOTHING = _Nothing()


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    """Compare the parts of two keys, one by one."""
    one, other = dict(_flat(here, "")), dict(_flat(there, ""))
    names = sorted(one.keys() | other.keys(), key=lambda name: (_rank(name), name))
    pairs = ((name, one.get(name, NOTHING), other.get(name, NOTHING)) for name in names)
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def nearest(parts: Mapping[str, Any], found: Iterable[Item]) -> tuple[Item, list[Difference]] | None:
    """Return the entry of the same pass whose key differs least, the last used among equals."""
    best: tuple[Item, list[Difference]] | None = None
    for item in found:
        theirs = (item.record or {}).get("parts")
        if not isinstance(theirs, dict) or theirs.get("pass") != parts.get("pass"):
            continue
        found_here = differences(parts, theirs)
        if best is None or (len(found_here), -item.used) < (len(best[1]), -best[0].used):
            best = item, found_here
    return best


def describe(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of an entry's key, a line each."""
    parts = record.get("parts")
    if not isinstance(parts, dict):
        yield "its record does not say: it was made by a version that did not keep the parts"
        return
    origin = record.get("origin") or {}
    for name in sorted(parts, key=_rank):
        value = parts[name]
        if name == "input" and "model" in origin:
            yield f"{'input':<18} the model {origin['model']} ({_short(value)})"
            for file, digest in sorted(origin.get("files", {}).items()):
                yield f"{'':<18} {file} {_short(digest)}"
        elif name == "input" and "step" in origin:
            yield f"{'input':<18} step {_short(value)} ({origin['step']})"
        elif isinstance(value, (dict, list)) and value:
            for i, (inner, own) in enumerate(_flat(value, "")):
                yield f"{name if i == 0 else '':<18} {inner} {_say(own)}"
        else:
            yield f"{name:<18} {_say(value)}"


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None or not value:
        yield path, value
        return
    for name, own in inner:
        yield from _flat(own, f"{path}.{name}" if path else str(name))


def _rank(name: str) -> int:
    first = name.partition(".")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def _say(value: Any) -> str:
    if value in (None, [], {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not value.isprintable():  # a template has line breaks, and this is one line
        return json.dumps(value, ensure_ascii=False)
    return _short(value) if isinstance(value, str) and len(value) == 64 else str(value)


def _short(digest: Any) -> str:
    return str(digest)[:12]
