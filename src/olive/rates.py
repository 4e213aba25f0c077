"""What passes took on this machine: time and memory of earlier steps, kept beside the cache's entries."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "rates.json"
KEPT = 32
"""Observations that are kept of each pass on each device, the latest."""


@dataclass(frozen=True)
class Observation:
    """One step that ran."""

    work: str
    """The pass."""
    device: str
    options: str
    """Digest of its options."""
    input_bytes: int
    seconds: float
    peak: int
    """Most memory that the process had, in bytes."""
    least: int
    """The memory that the step was expected to take at least, in bytes."""


class Rates:
    """The observations in a cache's folder."""

    def __init__(self, root: Path) -> None:
        self._file = root / FILE

    def all(self) -> list[Observation]:
        """Return all observations, the latest last; a file of another version counts as none."""
        try:
            return [Observation(**row) for row in json.loads(self._file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []

    def nearest(self, work: str, device: str, options: str, input_bytes: int) -> Observation | None:
        """Return the observation of a pass that is most like what is asked for: with the same options if there is one,
        then of the nearest size, then the latest."""
        found = [row for row in self.all() if (row.work, row.device) == (work, device)]
        same = [row for row in found if row.options == options]

        def distance(row: Observation) -> float:
            sizes = sorted((max(1, row.input_bytes), max(1, input_bytes)))
            return sizes[1] / sizes[0]

        return min(reversed(same or found), key=distance, default=None)

    def add(self, observation: Observation) -> None:
        """Keep an observation."""
        from filelock import FileLock

        self._file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._file.with_suffix(".lock")):
            rows = [*self.all(), observation]
            alike = [row for row in rows if (row.work, row.device) == (observation.work, observation.device)]
            dropped = alike[:-KEPT]
            fresh = self._file.with_suffix(".new")
            data: list[dict[str, Any]] = [asdict(row) for row in rows if row not in dropped]
            fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self._file)
