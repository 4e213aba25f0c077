"""The study file: what was asked and what came of it, a line each, so that a kill loses no finished trial.

A search that goes on asks its sampler again for the same points, with the same results told at the same places; so it
ends as if it had never stopped. Line 1 says what the study is of; then ``asked`` with the number of results that were
known, and ``finished`` with the trial.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olive.errors import ConfigError
from olive.search.trial import Trial

FILE = "trials.jsonl"


class Journal:
    """The record of one study, open for appending."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / FILE
        self.asked: dict[int, dict[str, Any]] = {}
        """By number: ``told``, the results known when it was asked, ``stage`` and ``values``."""
        self.finished: dict[int, Trial] = {}
        self.seconds = 0.0
        """Time that the search has taken so far."""
        lines = self._read()
        if lines and lines[0] != about:
            differs = sorted(key for key in about if lines[0].get(key) != about[key])
            raise ConfigError(
                f"{folder}: holds trials of another search ({', '.join(differs)} differ); delete the folder, or name "
                "another one in search.study"
            )
        for line in lines[1:]:
            self.seconds = line["at"]
            if "asked" in line:
                self.asked[line["asked"]] = line
            else:
                trial = Trial(**line["trial"])
                self.finished[trial.number] = trial
        if not lines:
            self._append(about)

    def _read(self) -> list[dict[str, Any]]:
        """Read all whole lines; a last one that a kill cut off is removed."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise ConfigError(f"{self.path}: is not a study file of ours; delete it or give another folder") from None

    def ask(self, number: int, told: int, stage: int, values: dict[str, Any], at: float) -> None:
        """Record that a point is tried, in which stage, and how many results were told before."""
        self._append({"asked": number, "told": told, "stage": stage, "values": values, "at": round(at, 3)})

    def finish(self, trial: Trial, at: float) -> None:
        """Record what came of it."""
        self._append({"finished": trial.number, "trial": trial.data(), "at": round(at, 3)})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def open_journal(folder: Path, about: dict[str, Any]) -> Iterator[Journal]:
    """Open a study's record; another process that has it open is an error."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: the study cannot be written ({error.strerror}); set search.study") from None
    lock = FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder}: another process is running this search") from None
    try:
        yield Journal(folder, about)
    finally:
        lock.release()
