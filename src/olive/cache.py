"""A content-addressed store of finished steps, and laying out its files where the user wants them.

An entry is a folder named after the step's full key: ``files/`` (what the pass wrote) and ``step.json`` (the record).
It is built aside and renamed into place, so that it is whole or not there. Failures are never stored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError, PassError
from olive.model import MANIFEST, digests, files, read_manifest, sha256

if TYPE_CHECKING:
    from olive.shared import Shared

LINK_ABOVE = 1 << 20
"""Files of at least this many bytes are shared with an output by hard link, smaller ones are copied."""
NEVER_LINKED = (".onnx.data",)
"""onnx refuses to read external data that has several hard links."""


@dataclass(frozen=True)
class Entry:
    """A finished step."""

    key: str
    files: Path
    record: dict[str, Any]


class Cache:
    """The store under one folder; safe under concurrent processes of one machine. ``shared`` is a store that several
    machines read from and write to as well."""

    def __init__(self, root: Path, shared: Shared | None = None, *, kept: bool = True) -> None:
        """``shared``: a store that several machines read and write as well. ``kept``: entries outlive the run; else an
        output may take their files."""
        self.root, self.shared, self.kept = root, shared, kept
        self._digests: dict[str, str] | None = None
        self._digesting = threading.Lock()
        self._uses: list[Path] = []

    def folder(self, key: str) -> Path:
        """Return where an entry lies, or would lie."""
        return self.root / "entries" / key[:2] / key

    def has(self, key: str) -> str | None:
        """Say where a finished step is, ``here`` or ``shared``, without fetching it; None if nowhere."""
        if self._local(key) is not None:
            return "here"
        return "shared" if self.shared is not None and self.shared.has(key) else None

    def get(self, key: str) -> Entry | None:
        """Return a finished step, or None; one that only the shared store has is fetched."""
        entry = self._local(key) or self._fetch(key)
        if entry is not None:
            with suppress(OSError):  # a folder that others write: the time of the last use is not worth a failure
                os.utime(self.folder(key) / "step.json")
            self._mark(key)
        return entry

    def _local(self, key: str) -> Entry | None:
        folder = self.folder(key)
        try:
            number = folder.stat().st_ino
            record = json.loads((folder / "step.json").read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
                raise ValueError("step.json is not a record of a step")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            todo = "run: olive cache verify --repair"
            raise PassError(f"{folder}: broken cache entry ({error}); {todo}") from None
        entry = Entry(key, folder / "files", record)
        if self._changed(entry):  # an edit through a shared file, or a failing disk: make it again
            with suppress(FileNotFoundError):
                if folder.stat().st_ino == number:  # not one that another process has made anew
                    self.discard(key)
            return None
        return entry

    def _fetch(self, key: str) -> Entry | None:
        record = self.shared.record(key) if self.shared is not None else None
        if self.shared is None or record is None:
            return None
        with self.stage(key) as staged:
            if not self.shared.fetch(record, staged / "files"):
                return None
            return self._local(key) or self._store(key, staged, record)

    def _mark(self, key: str) -> None:
        for use in self._uses:
            with use.open("a", encoding="utf-8") as keys:
                keys.write(key + "\n")

    def discard(self, key: str) -> None:
        """Remove an entry; it disappears at once, however long deleting its files takes."""
        rubbish = self.root / "building" / f"{uuid.uuid4().hex[:16]}.{os.getpid()}"
        rubbish.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.folder(key).rename(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)

    def _changed(self, entry: Entry) -> list[str]:
        """List the files that are no longer what the step wrote, by the digests remembered for unchanged files."""
        paths = {entry.files / name: digest for name, digest in entry.record.get("files", {}).items()}
        return [str(path) for path, digest in paths.items() if self._digest_of(path) != digest]

    def _digest_of(self, path: Path) -> str | None:
        try:
            return self.digest(path)
        except FileNotFoundError:
            return None

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a step, so that two processes do not compute it at once."""
        from filelock import FileLock

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            yield

    @contextmanager
    def using(self) -> Iterator[None]:
        """Mark the entries that are taken within as in use, so that :mod:`olive.inventory` leaves them alone; the mark
        is a lock, which the system drops when a process is killed."""
        from filelock import FileLock

        folder = self.root / "locks" / "used"
        folder.mkdir(parents=True, exist_ok=True)
        use = folder / f"{uuid.uuid4().hex}.keys"
        with FileLock(use.with_suffix(".lock")):
            use.touch()
            self._uses.append(use)
            try:
                yield
            finally:
                self._uses.remove(use)
                use.unlink()
        use.with_suffix(".lock").unlink(missing_ok=True)

    @contextmanager
    def stage(self, key: str) -> Iterator[Path]:
        """Yield an empty folder to build an entry in; what :meth:`put` did not take is removed."""
        sweep(self.root / "building", "*.*")
        folder = self.root / "building" / f"{key[:8]}-{uuid.uuid4().hex[:8]}.{os.getpid()}"
        (folder / "files").mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, key: str, staged: Path, record: dict[str, Any]) -> Entry:
        """Store a staged entry, here and in the shared store: its files become read-only, and it appears at once."""
        entry = self._store(key, staged, {"made": round(time.time(), 3), **record})
        self._mark(key)
        if self.shared is not None:
            self.shared.put(key, entry.record, entry.files)
        return entry

    def _store(self, key: str, staged: Path, record: dict[str, Any]) -> Entry:
        (staged / "step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in (staged / "files").rglob("*"):
            if path.is_file() and path.stat().st_mode & 0o222:
                path.chmod(0o444)
        folder = self.folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(folder)
        return Entry(key, folder / "files", record)

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """Yield a folder that survives a kill of the step, and is removed once the step is done."""
        folder = self.root / "scratch" / key
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def digest(self, path: Path) -> str:
        """Digest a file; one seen before, unchanged in inode, size and time, is not read again."""
        memo = self.root / "digests.json"
        with self._digesting:
            if self._digests is None:
                self._digests = {}
                with suppress(OSError, ValueError, AttributeError):  # it is only a memory
                    self._digests = dict(json.loads(memo.read_text(encoding="utf-8")).items())
        stat = path.stat()
        seen = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        if seen not in self._digests:
            found = sha256(path)  # several threads may be here: hashing lets them run side by side
            with self._digesting:
                self._digests[seen] = found
                if stat.st_size >= LINK_ABOVE:
                    self.root.mkdir(parents=True, exist_ok=True)
                    fresh = memo.with_suffix(f".{os.getpid()}")
                    fresh.write_text(json.dumps(self._digests), encoding="utf-8")
                    fresh.rename(memo)
        return self._digests[seen]


def default_root() -> Path:
    """Return the cache's folder: OLIVE_CACHE_DIR, else ``olive`` in the user's cache folder."""
    own = os.environ.get("OLIVE_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "olive"


def lay(source: Path, target: Path, *, move: bool = False) -> None:
    """Lay out the files of ``source``, its manifest aside; large ones share their bytes where that is safe.

    ``move``: nobody needs them in ``source`` any longer.
    """
    for name in list(files(source)):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if move and (source / name).stat().st_nlink == 1:  # a link is somebody else's file too
            shutil.move(source / name, place)
        else:
            link_or_copy(source / name, place)


def link_or_copy(source: Path, target: Path) -> None:
    """Place a file: as a reflink where the file system has them, as a hard link if it is large and read-only (an edit
    of a link would reach the original), else as a copy."""
    if _reflink(source, target):
        return
    stat = source.stat()
    large = stat.st_size >= LINK_ABOVE and not source.name.endswith(NEVER_LINKED)
    if large and not stat.st_mode & 0o222:
        try:
            target.hardlink_to(source.resolve())
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # else: another disk, or a file system without links
    shutil.copyfile(source, target)


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on this platform
        return False
    ficlone = 0x40049409  # linux/fs.h
    try:
        with source.open("rb") as read, target.open("wb") as write:
            fcntl.ioctl(write, ficlone, read.fileno())
        return True
    except OSError as error:
        target.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise
        return False


def check_replaceable(output: Path, overwrite: bool, digest: Callable[[Path], str] = sha256) -> None:
    """Refuse to replace a folder that is not ours, or that was changed since, unless told to."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder for the output")
    if overwrite:
        return
    manifest = read_manifest(output)
    if manifest is None:
        raise ConfigError(f"{output}: already holds something else; choose another folder or give --overwrite")
    known = manifest.get("files", {})
    changed = sorted(
        {name for name, _ in set(digests(output, digest).items()) ^ set(known.items())} | _added(output, known)
    )
    if changed:
        name = changed[0]
        raise ConfigError(f"{output}: {name} was changed or added since it was made; give --overwrite to replace it")


def _added(output: Path, known: Iterable[str]) -> set[str]:
    """Name what no digest tells of and we did not write: hidden files, folders, links that lead nowhere."""
    ours = {MANIFEST, *known}
    ours |= {parent.as_posix() for name in known for parent in Path(name).parents}
    return {path.relative_to(output).as_posix() for path in output.rglob("*")} - ours


def swap(staged: Path, output: Path) -> None:
    """Put a finished folder in an output's place; what was there disappears only once the new one is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        staged.rename(output)
        return
    if not _exchange(staged, output):  # two renames: the moment between them is not covered
        old = staged.with_name(staged.name + ".old")
        output.rename(old)
        staged.rename(output)
        staged = old
    shutil.rmtree(staged)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (Linux's renameat2), if the system can."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left: folders whose names end in the number of a process that is gone."""
    for left in folder.glob(pattern):
        pid = left.suffix[1:]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold an output folder against other processes of this machine, whichever cache they use."""
    from filelock import FileLock

    name = hashlib.sha256(os.fsencode(output.resolve())).hexdigest()[:32]
    with FileLock(Path(tempfile.gettempdir()) / f"olive-output-{name}.lock", mode=0o666):
        yield


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
