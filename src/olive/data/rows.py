"""Rows of a data source, each with the place it came from, and the digest of what was read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from olive.data.spec import FILE_READERS, DataSpec
from olive.errors import ConfigError, did_you_mean
from olive.model import sha256


@dataclass(frozen=True)
class Row:
    """One row: its fields, and where it stands (``data.jsonl:12``) for error messages."""

    where: str
    fields: Mapping[str, Any]


def default_text() -> str:
    """Return the shipped calibration text (public-domain books)."""
    return _shipped("default.txt")


def heldout_text() -> str:
    """Return the shipped evaluation text; it is from another book than :func:`default_text`."""
    return _shipped("heldout.txt")


def _shipped(name: str) -> str:
    return (resources.files("olive.data") / name).read_text(encoding="utf-8")


def rows(spec: DataSpec) -> Iterator[Row]:
    """Yield the rows of a data source one by one; a text file is one row with the field ``text``."""
    empty = True
    for row in _read(spec):
        empty = False
        yield row
    if empty:
        raise ConfigError(f"{describe(spec)}: empty: there is not one row in it")


def describe(spec: DataSpec) -> str:
    """Name a data source in an error message."""
    return ", ".join(spec.files) if spec.files else f"data {spec.name}"


def _read(spec: DataSpec) -> Iterator[Row]:
    if spec.name not in FILE_READERS:
        yield from _dataset(spec, spec.name, {"data_files": list(spec.files)} if spec.files else {})
        return
    for name in spec.files:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such data file")
    if spec.name == "text":
        texts = [(name, _decode(Path(name))) for name in spec.files] or [("the shipped text", default_text())]
        yield from (Row(name, {"text": text}) for name, text in texts if text.strip())
    elif spec.name == "json":
        for name in spec.files:
            yield from _json(name)
    elif spec.name == "csv":
        for name in spec.files:
            yield from _csv(name)
    else:
        # Streamed, so that nothing is copied to a cache in the home folder.
        for name in spec.files:
            if Path(name).stat().st_size > 0:
                yield from _dataset(spec, spec.name, {"data_files": [name], "streaming": True}, source=name)


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _json(name: str) -> Iterator[Row]:
    """Read one object per line, or one array of objects."""
    text = _decode(Path(name))
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
        for number, item in enumerate(items, 1):
            yield _object(f"{name}, item {number}", item)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{name}:{number}: not JSON: {error.msg} (column {error.colno}); each line must be one JSON object"
            ) from None
        yield _object(f"{name}:{number}", item)


def _csv(name: str) -> Iterator[Row]:
    """Read a table as it is written: a reader that guesses types makes 7.0 of 007, and nothing of an answer NA."""
    csv.field_size_limit(sys.maxsize)  # a field may be a book
    lines = csv.reader(io.StringIO(_decode(Path(name))), strict=True)
    try:
        names = next(lines, [])
        for values in lines:
            where = f"{name}:{lines.line_num}"
            if values and len(values) != len(names):
                raise ConfigError(f"{where}: {len(values)} fields, but the first line names {len(names)}; put a field "
                                  "that holds a comma in double quotes")  # fmt: skip
            if values:
                yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{name}:{lines.line_num}: cannot be read as csv: {error}") from None


def _object(where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise ConfigError(f'{where}: expected a JSON object such as {{"text": ...}}, got {type(item).__name__}')
    return Row(where, item)


def _dataset(spec: DataSpec, name: str, options: dict[str, Any], source: str | None = None) -> Iterator[Row]:
    """Read rows through the datasets library; ``source`` is what an error message names."""
    import datasets

    source = source or name
    try:
        data = datasets.load_dataset(name, spec.subset, split=spec.split, **options)
        for number, fields in enumerate(data, 1):
            yield Row(f"{source}, row {number}", fields)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if name in FILE_READERS:
            raise ConfigError(f"{source}: cannot be read as {name}: {reason}") from error
        hint = did_you_mean(name, FILE_READERS) if "/" not in name and not Path(name).exists() else ""
        raise ConfigError(f"data {source}: cannot be read as a dataset: {reason}{hint}") from error


def fingerprint(spec: DataSpec) -> str:
    """Digest the options and the contents of the data; where local files lie does not count."""
    digest = hashlib.sha256(spec.model_dump_json(exclude={"files"}).encode())
    local = [Path(name) for name in spec.files]
    if spec.name == "text" and not spec.files:
        digest.update(default_text().encode())
    elif spec.name not in FILE_READERS:
        folder = Path(spec.name)
        local = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        digest.update(json.dumps([spec.files, None if folder.is_dir() else _cached_commit(spec.name)]).encode())
    for path in local:
        if not path.is_file():
            raise ConfigError(f"{path}: no such data file")
        digest.update(f"{path.suffix} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _cached_commit(dataset: str) -> str | None:
    """Return the commit of a hub dataset that lies in the local cache, if one does."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return None
    found = [repo for repo in repos if repo.repo_type == "dataset" and repo.repo_id == dataset]
    main = found[0].refs.get("main") if found else None
    return main.commit_hash if main else None
