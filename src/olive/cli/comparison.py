"""What ``olive evaluate`` found of one model or two, as a table and as plain data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.model import Model

if TYPE_CHECKING:
    from olive.evaluate.metrics import Metric


@dataclass
class Column:
    """One model and what was found of it."""

    name: str
    """The model as it was asked for."""
    model: Model
    adapter: Path | None
    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Head of the column in a table."""
        return self.name if self.adapter is None else f"{self.name} + {self.adapter.stem}"

    def interval(self, metric: str) -> list[float] | None:
        """Return the range that holds a metric with 95 % confidence, where one was found."""
        found = [note["intervals"][metric] for note in self.notes.values() if metric in note.get("intervals", {})]
        return list(found[0]) if found else None


def as_data(columns: Sequence[Column], metrics: dict[str, Metric]) -> dict[str, Any]:
    """Return what was found as plain data."""
    keys = ("model", "against")
    return {
        key: {"path": str(c.model.path), "adapter": None if c.adapter is None else str(c.adapter), "facts": c.notes}
        for key, c in zip(keys, columns, strict=False)
    } | {
        "metrics": [
            {"name": name, "unit": metric.unit, "direction": metric.direction}
            | {("value" if c is columns[0] else "against"): c.values.get(name) for c in columns}
            for name, metric in metrics.items()
        ]
    }


def table(columns: Sequence[Column], metrics: dict[str, Metric]) -> list[list[str]]:
    """Return the head and the rows of the table; with a second model also the change from it."""
    head = ["metric", *(column.title for column in columns)]
    rows = [[name, *(_cell(column, metric) for column in columns)] for name, metric in metrics.items()]
    if len(columns) == 1:
        return [head, *rows]
    changes = [_change(columns[0].values.get(name), columns[1].values.get(name), m) for name, m in metrics.items()]
    return [[*head, "change"], *([*row, change] for row, change in zip(rows, changes, strict=True))]


def _cell(column: Column, metric: Metric) -> str:
    value = column.values.get(metric.name)
    if value is None:
        return "-"
    unit, scale = ("MB", 1e6) if metric.unit == "bytes" else (metric.unit, 1.0)
    text = f"{value / scale:.5g}" + (f" {unit}" if unit else "")
    around = column.interval(metric.name)
    return text if around is None else f"{text} ({around[0] / scale:.4g} to {around[1] / scale:.4g})"


def _change(value: float | None, other: float | None, metric: Metric) -> str:
    if value is None or other is None:
        return "-"
    share = f"{100 * (value / other - 1):+.2f} %" if other else ""
    if value == other or share in ("+0.00 %", "-0.00 %"):
        return "same"
    return f"{share}, " * bool(share) + ("better" if metric.better(value, other) else "worse")


def show(rows: list[list[str]]) -> None:
    """Print a table; on a terminal with lines around it."""
    if not sys.stdout.isatty():
        for line in plain(rows):
            print(line)
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(*rows[0])
    for row in rows[1:]:
        shown.add_row(*row)
    Console(markup=False).print(shown)


def plain(rows: list[list[str]]) -> Iterator[str]:
    """Yield a table as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
