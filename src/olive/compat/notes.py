"""What the translation of a file has to say, and reading options that may stand one level deeper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Notes:
    """What has no counterpart, each with its place."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """Keys that were left out or mean something else here."""
        self.refused: list[str] = []
        """Passes without a counterpart."""

    def add(self, place: str, text: str) -> None:
        """Note a key."""
        self.lines.append(f"{place}: {text}")

    def refuse(self, place: str, text: str) -> None:
        """Note a pass that has no counterpart."""
        self.refused.append(f"{place}: {text}")


def flat(given: Any) -> dict[str, Any]:
    """Return options that stand by themselves, or in older files one level deeper under ``config`` or ``params``."""
    if not isinstance(given, Mapping):
        return {}
    found = {str(key): value for key, value in given.items() if key not in ("config", "params")}
    for inner in ("config", "params"):
        if isinstance(given.get(inner), Mapping):
            found |= flat(given[inner])
    return found
