"""What the cache holds: listing it, keeping it under a size, and reading every file again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from olive.cache import Cache, sweep
from olive.errors import ConfigError
from olive.model import sha256

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class Inode(NamedTuple):
    """A file on disk, which several names may share."""

    size: int
    links: int
    """Names anywhere."""
    names: int
    """Names in one entry."""


@dataclass(frozen=True)
class Item:
    """An entry of the cache, or what a step that was interrupted has left for its return."""

    key: str
    kind: str
    """The pass that made it; ``unfinished`` for what an interrupted step left."""
    path: Path
    inodes: dict[tuple[int, int], Inode]
    """Its files, by device and number."""
    made: float | None
    used: float
    record: dict[str, Any] | None
    """None where the record cannot be read, and for what is unfinished."""

    @property
    def size(self) -> int:
        """Bytes of its files; files that it shares with other entries or outputs count too."""
        return sum(inode.size for inode in self.inodes.values())


@dataclass(frozen=True)
class Collected:
    """What a collection removed and kept."""

    removed: tuple[Item, ...]
    in_use: int
    """Entries that had to stay although they were due."""
    size: int
    """Bytes that the cache still holds."""
    freed: int
    """Bytes that the disk has got back: what outputs share by hard link stays until they go too."""


def items(cache: Cache) -> list[Item]:
    """List what the cache holds, the longest unused first."""
    found = []
    for folder in (cache.root / "entries").glob("*/*"):
        try:
            record = json.loads((folder / "step.json").read_text(encoding="utf-8"))
            used, made = (folder / "step.json").stat().st_mtime, record.get("made")
            kind = str(record.get("pass"))
        except FileNotFoundError:
            continue  # another process has just removed it
        except (OSError, ValueError, AttributeError):
            record, kind, used, made = None, "broken", 0.0, None
        found.append(Item(folder.name, kind, folder, _inodes(folder), made, used, record))
    for folder in (cache.root / "scratch").glob("*"):
        found.append(Item(folder.name, "unfinished", folder, _inodes(folder), None, folder.stat().st_mtime, None))
    return sorted(found, key=lambda item: (item.used, item.key))


def total(found: list[Item]) -> int:
    """Return the bytes of all, files that several share counted once."""
    return sum(inode.size for inode in {k: v for item in found for k, v in item.inodes.items()}.values())


def _inodes(folder: Path) -> dict[tuple[int, int], Inode]:
    found: dict[tuple[int, int], Inode] = {}
    for stat in (path.stat() for path in folder.rglob("*") if path.is_file()):
        number = stat.st_dev, stat.st_ino
        names = found[number].names if number in found else 0
        found[number] = Inode(stat.st_size, stat.st_nlink, names + 1)
    return found


def collect(cache: Cache, max_size: int) -> Collected:
    """Remove the longest unused entries until the cache is no larger than ``max_size`` bytes. An entry that a running
    process builds, or has taken, stays."""
    sweep(cache.root / "building", "*.*")
    found = items(cache)
    names: dict[tuple[int, int], int] = {}
    for item in found:
        for number, inode in item.inodes.items():
            names[number] = names.get(number, 0) + inode.names
    outside = {number for item in found for number, inode in item.inodes.items() if inode.links > names[number]}
    size, freed, in_use, removed = total(found), 0, 0, []
    for item in found:
        if size <= max_size:
            break
        with _unused(cache, item.key) as free:
            if not free:
                in_use += 1
                continue
            _remove(cache, item)
        removed.append(item)
        for number, inode in item.inodes.items():
            names[number] -= inode.names
            if not names[number]:
                size -= inode.size
                freed += 0 if number in outside else inode.size
    return Collected(tuple(removed), in_use, size, freed)


def _remove(cache: Cache, item: Item) -> None:
    if item.kind == "unfinished":
        import shutil

        shutil.rmtree(item.path, ignore_errors=True)
    else:
        cache.discard(item.key)


@contextmanager
def _unused(cache: Cache, key: str) -> Iterator[bool]:
    """Hold a step's lock, if nobody has it and nobody uses the entry; say whether that is so."""
    from filelock import FileLock, Timeout

    folder = cache.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield key not in in_use(cache)
    finally:
        lock.release()


def in_use(cache: Cache) -> set[str]:
    """Return the keys of the entries that running processes have taken; what killed ones left is removed."""
    from filelock import FileLock, Timeout

    keys: set[str] = set()
    for use in (cache.root / "locks" / "used").glob("*.keys"):
        try:
            with FileLock(use.with_suffix(".lock"), timeout=0):
                use.unlink(missing_ok=True)
            use.with_suffix(".lock").unlink(missing_ok=True)
        except Timeout:
            keys |= set(use.read_text(encoding="utf-8").split())
    return keys


def damaged(cache: Cache) -> list[tuple[Item, list[str]]]:
    """Read every file of every entry; return the entries that are not what their records say, with what is wrong."""
    found = []
    for item in items(cache):
        if item.kind == "unfinished":
            continue
        wrong = _wrong(item)
        if wrong and item.path.exists():
            found.append((item, wrong))
    return found


def _wrong(item: Item) -> list[str]:
    if item.record is None or not isinstance(item.record.get("files"), dict):
        return ["step.json: not a record of a step"]
    wrong = []
    recorded: dict[str, str] = item.record["files"]
    folder = item.path / "files"
    for name, digest in recorded.items():
        try:
            wrong += [f"{name}: changed"] if sha256(folder / name) != digest else []
        except OSError as error:
            wrong.append(f"{name}: {error.strerror or error}")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return wrong + [f"{name}: not in the record" for name in sorted(there - recorded.keys())]


def repair(cache: Cache, found: list[tuple[Item, list[str]]]) -> None:
    """Remove damaged entries, so that their steps are run again; wait for whoever holds one."""
    for item, _ in found:
        with cache.lock(item.key):
            cache.discard(item.key)


def find(cache: Cache, start: str) -> Item:
    """Return the entry whose key starts so."""
    found = [item for item in items(cache) if item.key.startswith(start.lower()) and item.record is not None]
    if not found:
        raise ConfigError(f"{start}: no entry of the cache has a key that starts so; olive cache ls lists them")
    if len(found) > 1:
        raise ConfigError(f"{start}: {len(found)} keys start so; give more of it, as in {found[0].key[:16]}")
    return found[0]


def read_size(text: str, where: str) -> int:
    """Return the bytes of a size such as ``50GB`` or ``1.5 GiB``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{where} {text}: give a number and a unit, as in 500MB, 50GB or 1.5TB")
    return int(float(match[1]) * UNITS[match[2].upper()])
