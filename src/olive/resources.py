"""Memory and disk of this machine: what is free, and what a piece of work takes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import TracebackType

CGROUPS = ((Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
           (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
            Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")))  # fmt: skip
"""A container's limit and use, by versions 2 and 1 of the kernel's interface."""
INTERVAL_S = 0.02


def available_memory(*, swap: bool = True) -> int:
    """Return the bytes that processes can still get, within the container's limit if there is one."""
    import psutil

    found = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    for limit, use in CGROUPS:
        try:
            most, now = limit.read_text(encoding="ascii").strip(), int(use.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if most.isdigit():
            found = min(found, max(0, int(most) - now + _reclaimable(use.parent)))
    return found


def _reclaimable(group: Path) -> int:
    """Return the bytes of cached files that count as used although the kernel gives them back."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    stat = dict(line.split()[:2] for line in lines)
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def free_disk(place: Path) -> int:
    """Return the bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing(place)).free


def existing(place: Path) -> Path:
    """Return the nearest folder above that exists."""
    return next(path for path in (place, *place.absolute().parents) if path.is_dir())


class Watch:
    """Watches the memory of this process while a piece of work runs; mapped files do not count."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        import psutil

        process = psutil.Process()
        last = False
        while not last:
            last = self._done.wait(INTERVAL_S) if self.peak else False
            now = process.memory_info()
            self.peak = max(self.peak, now.rss - getattr(now, "shared", 0))
