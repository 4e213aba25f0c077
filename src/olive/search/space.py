"""The holes of a template: a workflow file where options of passes are open, and passes may have alternatives.

    bits: {choice: [4, 8]}                        one of the values
    alpha: {range: [0.1, 10], log: true}          a number between; step: 16 for every 16th
    - [{type: rtn}, {type: awq, ...}, null]       one of the passes, or none

A point gives each hole a value. Holes of an alternative exist only where that alternative is chosen.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from olive.config import mistakes
from olive.errors import ConfigError
from olive.workflow import pass_options, read_data_sets, read_workflow

Point = dict[str, Any]
Place = tuple[str | int, ...]
SKIP = "none"
STAND_IN = {"type": "dequantize"}
"""A pass without options, in place of passes whose mistakes are reported on their own."""


@dataclass(frozen=True)
class Choice:
    """A hole that takes one of some values; for alternatives the values are their labels."""

    path: str
    """Name of the hole: passes.1.bits; in alternatives passes.1.awq.bits, and passes.1 for which one."""
    place: Place
    """Where the hole is in the template's data."""
    when: tuple[str, str] | None
    """The hole of alternatives, and the label, that this hole depends on."""
    values: tuple[Any, ...]

    def grid(self) -> list[Any] | None:
        """Return every value, or None if there are endlessly many."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A hole that takes a number; a whole number if all of its numbers are whole."""

    path: str
    place: Place
    when: tuple[str, str] | None
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 0))

    def grid(self) -> list[Any] | None:
        """Return every value, or None if there are endlessly many."""
        if self.whole:
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None:
            return None
        return [self.low + i * self.step for i in range(math.floor((self.high - self.low) / self.step + 1e-9) + 1)]


Hole = Choice | Range


@dataclass(frozen=True)
class Space:
    """The holes of a template in their order; those with a fixed value are not searched."""

    holes: tuple[Hole, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, suggest: Callable[[Hole], Any]) -> Point:
        """Make a point: ask for the value of each hole that exists, given the values before it."""
        point: Point = {}
        for hole in self.holes:
            if hole.when is None or point.get(hole.when[0]) == hole.when[1]:
                point[hole.path] = self.fixed[hole.path] if hole.path in self.fixed else suggest(hole)
        return point

    def points(self) -> Iterator[Point]:
        """Yield every point, the last hole's values varying fastest."""
        yield from self._points(0, {})

    def _points(self, index: int, point: Point) -> Iterator[Point]:
        if index == len(self.holes):
            yield dict(point)
            return
        hole = self.holes[index]
        if hole.when is not None and point.get(hole.when[0]) != hole.when[1]:
            yield from self._points(index + 1, point)
            return
        values = [self.fixed[hole.path]] if hole.path in self.fixed else hole.grid()
        assert values is not None, "a grid of endlessly many points"
        for value in values:
            yield from self._points(index + 1, point | {hole.path: value})

    def size(self) -> int | None:
        """Return the number of points, or None if there are endlessly many."""
        counts = {hole.path: self._count(hole) for hole in self.holes}
        if any(count is None for count in counts.values()):
            return None
        total = 1
        for hole in self.holes:
            inner = [other for other in self.holes if other.when is not None and other.when[0] == hole.path]
            if hole.when is None and not inner:
                total *= counts[hole.path] or 0
            elif hole.when is None:
                labels = [self.fixed[hole.path]] if hole.path in self.fixed else hole.grid() or []
                total *= sum(
                    math.prod(counts[o.path] or 0 for o in inner if o.when == (hole.path, label)) for label in labels
                )
        return total

    def _count(self, hole: Hole) -> int | None:
        if hole.path in self.fixed:
            return 1
        values = hole.grid()
        return None if values is None else len(values)

    def stages(self) -> list[int]:
        """Return the passes that have holes, by their place in the template."""
        return list(dict.fromkeys(int(hole.place[1]) for hole in self.holes))

    def stage(self, number: int, best: Mapping[str, Any]) -> Space:
        """Keep the holes of one pass open; the others have the values of ``best``, else the first of their own."""
        others = [hole for hole in self.holes if hole.place[1] != number]
        return replace(self, fixed={hole.path: best.get(hole.path, first(hole)) for hole in others})


def first(hole: Hole) -> Any:
    """Return the value that is listed first."""
    return hole.values[0] if isinstance(hole, Choice) else hole.low


def is_template(data: Any) -> bool:
    """Tell whether plain data of a workflow has holes or alternatives."""
    steps = data.get("passes") if isinstance(data, Mapping) else None
    if not isinstance(steps, list):
        return False
    return any(isinstance(step, list) for step in steps) or any(True for _ in _marks(steps, ()))


def read_space(data: Any, where: str = "workflow") -> Space:
    """Validate a template and return its holes; mistakes are reported with their places, values that do not fit
    together are not mistakes."""
    data = dict(data)
    read_workflow(data | {"passes": [STAND_IN]}, where)
    for place, _ in _marks({key: value for key, value in data.items() if key != "passes"}, ()):
        raise ConfigError(f"{where}: {_dotted(place)}: only options of passes may be holes")
    holes: list[Hole] = []
    for number, step in enumerate(data["passes"]):
        holes += _pass_holes(step, number, where)
    space = Space(tuple(holes))
    lines = list(_check(space, data, where))
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    if space.size() == 1:
        raise ConfigError(f"{where}: passes: every hole has one value only, so there is nothing to search")
    return space


def fill(template: Mapping[str, Any], space: Space, point: Point) -> dict[str, Any]:
    """Return the template's workflow, as plain data, with the values of ``point`` in its holes."""
    data = copy.deepcopy(dict(template))
    holes = {hole.path: hole for hole in space.holes}
    chosen = {path: holes[path] for path in point if len(holes[path].place) == 2}
    for path in point.keys() - chosen:
        _put(data, holes[path].place, point[path])
    for path, hole in chosen.items():
        assert isinstance(hole, Choice)
        _put(data, hole.place, data["passes"][hole.place[1]][hole.values.index(point[path])])
    data["passes"] = [step for step in data["passes"] if not _skips(step)]
    data.pop("search", None)
    return data


def _put(data: Any, place: Place, value: Any) -> None:
    for part in place[:-1]:
        data = data[part]
    data[place[-1]] = value


def _pass_holes(step: Any, number: int, where: str) -> Iterator[Hole]:
    path = f"passes.{number}"
    if not isinstance(step, list):
        yield from _option_holes(step, ("passes", number), path, None, where)
        return
    if len(step) < 2:
        raise ConfigError(f"{where}: {path}: expected at least two alternatives, got {step!r}")
    labels = _labels(step)
    yield Choice(path, ("passes", number), None, tuple(labels))
    for i, (label, alternative) in enumerate(zip(labels, step, strict=True)):
        if not _skips(alternative):
            inner = f"{path}.{label}"
            yield from _option_holes(alternative, ("passes", number, i), inner, (path, label), where)


def _labels(alternatives: list[Any]) -> list[str]:
    """Name alternatives after their types; a type's second and further ones are numbered."""
    labels: list[str] = []
    for step in alternatives:
        kind = SKIP if _skips(step) else str(step.get("type") if isinstance(step, Mapping) else step)
        count = sum(label.rpartition("-")[0] == kind or label == kind for label in labels)
        labels.append(f"{kind}-{count + 1}" if count else kind)
    return labels


def _skips(step: Any) -> bool:
    return step is None or (isinstance(step, Mapping) and dict(step) == {"type": SKIP})


def _option_holes(step: Any, place: Place, path: str, when: tuple[str, str] | None, where: str) -> Iterator[Hole]:
    for inner, mark in _marks(step, ()):
        yield _hole(mark, ".".join([path, *map(str, inner)]), (*place, *inner), when, where)


def _marks(value: Any, place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield every mapping that stands for a hole, with its place."""
    if isinstance(value, Mapping):
        if "choice" in value or "range" in value:
            yield place, value
            return
        for key, inner in value.items():
            yield from _marks(inner, (*place, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _marks(inner, (*place, i))


def _hole(mark: Mapping[str, Any], path: str, place: Place, when: tuple[str, str] | None, where: str) -> Hole:
    known = {"choice"} if "choice" in mark else {"range", "log", "step"}
    unknown = sorted(map(str, set(mark) - known))
    if unknown:
        raise ConfigError(
            f"{where}: {path}: unknown word {unknown[0]!r} in a hole; allowed: {', '.join(sorted(known))}"
        )
    if "choice" in mark:
        values = mark["choice"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {path}: choice: expected a list of values, got {values!r}")
        if any(True for _ in _marks(values, ())):
            raise ConfigError(f"{where}: {path}: choice: a value may not hold holes; list alternatives of the pass")
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            raise ConfigError(f"{where}: {path}: choice: a value is given twice, in {values!r}")
        return Choice(path, place, when, tuple(values))
    ends, log, step = mark["range"], mark.get("log", False), mark.get("step")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    if not numbers or not ends[0] < ends[1]:
        raise ConfigError(f"{where}: {path}: range: expected [low, high] with low below high, got {ends!r}")
    if not isinstance(log, bool) or (log and (ends[0] <= 0 or step is not None)):
        raise ConfigError(f"{where}: {path}: log: true or false; true only for a range above 0 and without a step")
    if step is not None and not (type(step) in (int, float) and 0 < step <= ends[1] - ends[0]):
        raise ConfigError(f"{where}: {path}: step: expected a number from above 0 to the range's width, got {step!r}")
    low, high = ends
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step  # the last one that is reached
    return Range(path, place, when, low, high, log, step)


def _check(space: Space, data: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield the mistakes of every pass: each hole's values are tried one by one, the other holes at their first."""
    named = read_data_sets(data.get("data"), where)
    for number, step in enumerate(data["passes"]):
        labels = _labels(step) if isinstance(step, list) else [None]
        for i, label in enumerate(labels):
            place: Place = ("passes", number) if label is None else ("passes", number, i)
            path = f"passes.{number}" if label is None else f"passes.{number}.{label}"
            bare = step if label is None else step[i]
            if _skips(bare):
                continue
            holes = [hole for hole in space.holes if hole.place[: len(place)] == place and len(hole.place) > len(place)]
            yield from _check_pass(bare, holes, named, len(place), f"{where}: {path}")


def _check_pass(bare: Any, holes: list[Hole], named: Mapping[str, Any], depth: int, where: str) -> Iterator[str]:
    if not isinstance(bare, Mapping):
        raise ConfigError(f"{where}: expected a mapping with a type, got {bare!r}")
    start = {hole.place[depth:]: first(hole) for hole in holes}
    for loc, line in _mistakes(bare, start, named, where):
        # at a hole: told below, with its values; above one: a matter of combination
        if not any(loc[: len(place)] == place or place[: len(loc)] == loc for place in start):
            yield line
    for hole in holes:
        place = hole.place[depth:]
        for value in hole.values if isinstance(hole, Choice) else (hole.low, hole.high):
            found = _mistakes(bare, start | {place: value}, named, where)
            yield from (line for loc, line in found if loc[: len(place)] == place)


def _mistakes(
    bare: Mapping[str, Any], values: Mapping[Place, Any], named: Mapping[str, Any], where: str
) -> list[tuple[Place, str]]:
    filled = copy.deepcopy(dict(bare))
    for place, value in values.items():
        _put(filled, place, value)
    return mistakes(*pass_options(filled, named, where), f"{where}.")


def plain(data: Any) -> str:
    """Return a text that is the same for the same plain data."""
    return json.dumps(data, sort_keys=True, default=str)


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))
