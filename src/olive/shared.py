"""A cache that several machines share: a folder, or a bucket behind any file system that fsspec knows.

Layout: ``entries/KEY[:2]/KEY.json`` is a step's record, ``blobs/DIGEST[:2]/DIGEST`` a file's contents. Files go first
and the record last, so that an entry is there whole or not at all; a file is named by its digest, so that two machines
that upload the same step cannot mix theirs, and equal files are stored once. What comes back is checked against its
digest.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olive.errors import ConfigError, MissingDependency
from olive.model import sha256

logger = logging.getLogger(__name__)
EXTRAS = {"s3": "s3", "s3a": "s3", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""The extra that a file system needs, by its protocol."""


def configured() -> Shared | None:
    """Return the store that OLIVE_SHARED_CACHE names, if one is set."""
    url = os.environ.get("OLIVE_SHARED_CACHE")
    return Shared(url) if url else None


class Shared:
    """A shared store under a URL: ``file:///mnt/olive``, ``s3://bucket/olive``, ``abfs://container/olive``."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        protocol = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.url_to_fs(url)
        except ImportError:
            extra = EXTRAS.get(protocol)
            todo = f"run: pip install 'olive-onnx[{extra}]'" if extra else "install the fsspec file system for it"
            raise MissingDependency(f"OLIVE_SHARED_CACHE {url}: no package for {protocol}:// here; {todo}") from None
        except ValueError as error:
            raise ConfigError(f"OLIVE_SHARED_CACHE {url}: {error}") from None
        self._local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)
        self._damaged: set[str] = set()
        self._lost = False
        """It failed once; asking again for every step would cost a timeout each."""

    def has(self, key: str) -> bool:
        """Tell whether a finished step is there; its files are not read."""
        return self.record(key) is not None

    def record(self, key: str) -> dict[str, Any] | None:
        """Return a step's record; None if there is none, or it cannot be read."""
        if self._lost:
            return None
        with self._reachable("read"):
            path = self._entry(key)
            if not self._fs.exists(path):
                return None
            try:
                found = json.loads(self._fs.cat_file(path))
            except ValueError:
                logger.warning("%s: broken record of step %s; it is made again", self.url, key[:12])
                return None
            return found if isinstance(found, dict) else None
        return None

    def fetch(self, record: dict[str, Any], folder: Path) -> bool:
        """Write a step's files into ``folder``; False if one is missing or is not what the record says."""
        with self._reachable("read"):
            for name, digest in record.get("files", {}).items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs.get_file(self._blob(digest), str(place))
                except FileNotFoundError:
                    logger.warning("%s: lacks %s of a step; it is made again", self.url, name)
                    return False
                if sha256(place) != digest:
                    logger.warning("%s: %s is damaged there; the step is made again", self.url, name)
                    self._damaged.add(digest)
                    return False
            return True
        return False

    def put(self, key: str, record: dict[str, Any], folder: Path) -> None:
        """Upload a finished step; failing to is a warning, since the step itself is done."""
        if self._lost:
            return
        with self._reachable("written"):
            for name, digest in record.get("files", {}).items():
                if digest in self._damaged or not self._fs.exists(self._blob(digest)):
                    self._upload(folder / name, self._blob(digest))
                    self._damaged.discard(digest)
            self._write(json.dumps(record, indent=1).encode(), self._entry(key))

    def _entry(self, key: str) -> str:
        return f"{self._root}/entries/{key[:2]}/{key}.json"

    def _blob(self, digest: str) -> str:
        return f"{self._root}/blobs/{digest[:2]}/{digest}"

    def _upload(self, source: Path, target: str) -> None:
        if not self._local:  # an object appears once it is complete
            self._fs.put_file(str(source), target)
            return
        part = self._beside(target)
        self._fs.put_file(str(source), part)
        self._fs.mv(part, target)

    def _write(self, data: bytes, target: str) -> None:
        if not self._local:
            self._fs.pipe_file(target, data)
            return
        part = self._beside(target)
        self._fs.pipe_file(part, data)
        self._fs.mv(part, target)

    def _beside(self, target: str) -> str:
        """Name a file to write before it is renamed: files of a folder would be seen while they grow."""
        folder = target.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        return f"{folder}/.part-{uuid.uuid4().hex}"

    @contextmanager
    def _reachable(self, what: str) -> Iterator[None]:
        """Turn any failure of the store into one warning: the work goes on without it."""
        try:
            yield
        except Exception as error:  # every file system raises its own kinds
            self._lost = True
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s: the shared cache cannot be %s (%s); going on without it", self.url, what, said)
