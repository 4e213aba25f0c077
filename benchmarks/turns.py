"""Processes that take turns: each measures one candidate when it is asked to, and sleeps otherwise.

Needs nothing but Python's own library, so that a worker may live in an environment without torch or ONNX Runtime.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Request = dict[str, Any]


class Worker:
    """A process that answers requests, one JSON line each."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._idle_cpu = self._idle_wall = 0.0
        self.facts = self._reply()
        """What the worker said once it had loaded its candidate."""
        self._left = self._clocks()

    def ask(self, kind: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin
        cpu, wall = self._clocks()
        self._idle_cpu += cpu - self._left[0]
        self._idle_wall += wall - self._left[1]
        self._process.stdin.write(json.dumps({"kind": kind} | request) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        self._left = self._clocks()
        return reply

    @property
    def idle_cpu(self) -> float:
        """Share of one core that the worker used while it was not its turn."""
        return self._idle_cpu / self._idle_wall if self._idle_wall else 0.0

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))}: ended without an answer")  # type: ignore[arg-type]
        return json.loads(line)

    def _clocks(self) -> tuple[float, float]:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        user, system = int(fields[11]), int(fields[12])  # fields 14 and 15 of proc(5)
        return (user + system) / os.sysconf("SC_CLK_TCK"), time.perf_counter()


def serve(load: Callable[[], Callable[[Request], dict[str, Any]]]) -> None:
    """Be a worker: load the candidate, then answer requests until standard input ends.

    ``load`` returns the function that answers. Each answer also holds the peak of memory since the one before; the
    first also what the process held before it loaded.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def reply(found: dict[str, Any]) -> None:
        replies.write(json.dumps(found | memory()) + "\n")
        replies.flush()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak

    bare = memory()["held"]
    started = time.perf_counter()
    answer = load()
    reply({"load_s": time.perf_counter() - started, "bare": bare})
    for line in sys.stdin:
        reply(answer(json.loads(line)))


def memory() -> dict[str, int]:
    """Bytes: the peak, and of what is held now all of it and the part that the system cannot take back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    names = {"peak": "VmHWM", "held": "VmRSS", "anonymous": "RssAnon"}
    return {key: int(status[name].split()[0]) * 1024 for key, name in names.items()}


def order(names: Sequence[str], turn: int) -> list[str]:
    """Rotate the names, and turn every other round around, so that no one always follows the same neighbour."""
    start = turn // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if turn % 2 else rotated


def median(values: Sequence[float]) -> str:
    """Format a median with the best value."""
    return f"{statistics.median(values):.1f} ({max(values):.1f})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Format the median ratio of values of the same rounds, with its quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"
