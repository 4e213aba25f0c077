"""The shared store: read through and written through, whole or not at all, checked on the way back."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from olive.cache import Cache
from olive.cli import main
from olive.errors import ConfigError, MissingDependency
from olive.model import digests
from olive.shared import Shared
from places import LAB_MODEL

KEY = "ab" * 32


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/shared"
        return
    place = f"memory://{uuid.uuid4().hex}"
    yield place
    fs, root = fsspec.url_to_fs(place)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def put(cache: Cache, key: str = KEY, contents: bytes = b"made") -> None:
    with cache.stage(key) as staged:
        (staged / "files" / "sub").mkdir()
        for name in ("model", "sub/part"):
            (staged / "files" / name).write_bytes(contents)
        cache.put(key, staged, {"pass": "rtn", "files": digests(staged / "files")})


def stored(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url)
    return sorted(path.removeprefix(root) for path in fs.find(root))


def blob(url: str) -> tuple[Any, str]:
    fs, root = fsspec.url_to_fs(url)
    return fs, next(path for path in fs.find(f"{root}/blobs"))


def test_an_entry_of_one_machine_serves_another(tmp_path: Path, url: str) -> None:
    put(Cache(tmp_path / "one", Shared(url)))
    other = Cache(tmp_path / "two", Shared(url))
    assert other.has(KEY) == "shared"
    assert not (tmp_path / "two" / "entries").exists()  # asking fetches nothing
    entry = other.get(KEY)
    assert entry is not None
    assert {name: (entry.files / name).read_bytes() for name in digests(entry.files)} == {
        "model": b"made",
        "sub/part": b"made",
    }
    assert other.has(KEY) == "here"
    assert not (entry.files / "model").stat().st_mode & 0o222
    assert entry.record["pass"] == "rtn"
    assert len([path for path in stored(url) if "/blobs/" in path]) == 1  # equal files are stored once


def test_an_upload_that_ends_early_is_no_entry(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(url)
    monkeypatch.setattr(shared, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put(Cache(tmp_path / "one", shared))
    assert Cache(tmp_path / "two", Shared(url)).get(KEY) is None
    put(Cache(tmp_path / "three", Shared(url)))  # goes on from the blobs that are there
    assert Cache(tmp_path / "two", Shared(url)).get(KEY) is not None


def test_no_file_of_a_folder_is_seen_half_written(tmp_path: Path) -> None:
    shared = Shared(f"file://{tmp_path}/shared")
    seen = []
    original = shared._fs.put_file
    shared._fs = type("Slow", (), {})()
    fs, _ = fsspec.url_to_fs(f"file://{tmp_path}/shared")

    def put_file(source: str, target: str) -> None:
        original(source, target)
        seen.extend(stored(shared.url))

    for name in ("exists", "makedirs", "mv", "pipe_file", "cat_file", "get_file"):
        setattr(shared._fs, name, getattr(fs, name))
    shared._fs.put_file = put_file
    put(Cache(tmp_path / "one", shared))
    assert seen and all("/.part-" in path for path in seen)
    assert not any("/.part-" in path for path in stored(shared.url))


def test_a_damaged_file_is_noticed_made_again_and_replaced(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(Cache(tmp_path / "one", Shared(url)))
    fs, path = blob(url)
    fs.pipe_file(path, b"rotten")
    cache = Cache(tmp_path / "two", Shared(url))
    with caplog.at_level(logging.WARNING, "olive"):
        assert cache.get(KEY) is None
    assert "is damaged there; the step is made again" in caplog.text
    assert not list((tmp_path / "two").glob("building/*"))
    put(cache)
    assert fs.cat_file(path) == b"made"


def test_a_missing_file_or_a_broken_record_is_no_entry(tmp_path: Path, url: str) -> None:
    put(Cache(tmp_path / "one", Shared(url)))
    fs, path = blob(url)
    fs.rm(path)
    assert Cache(tmp_path / "two", Shared(url)).get(KEY) is None
    record = next(p for p in fs.find(fsspec.url_to_fs(url)[1]) if "/entries/" in p)
    fs.pipe_file(record, b"{")
    assert Cache(tmp_path / "two", Shared(url)).has(KEY) is None


def test_a_store_that_fails_is_a_warning_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Shared(f"memory://{uuid.uuid4().hex}")

    def fail(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(shared._fs, "exists", fail)
    cache = Cache(tmp_path, shared)
    with caplog.at_level(logging.WARNING, "olive"):
        assert cache.get(KEY) is None
        put(cache)
        assert cache.get("cd" * 32) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{shared.url}: the shared cache cannot be read (no route); going on without it"
    ]
    assert cache.get(KEY) is not None


def test_a_run_takes_its_steps_from_the_shared_store(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump({"input_model": {"path": str(LAB_MODEL)}, "passes": [{"type": "rtn"}],
                                    "verify": {"level": "files"}}))  # fmt: skip
    monkeypatch.setenv("OLIVE_SHARED_CACHE", url)
    for name in ("one", "two"):
        monkeypatch.setenv("OLIVE_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        assert main(["plan", str(file), "-o", str(tmp_path / name)]) == 0
        assert main(["run", str(file), "-o", str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    assert told.count("same key in the shared cache") == 1
    assert "rtn          cached" in told
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_store_that_cannot_be_opened_is_told() -> None:
    with pytest.raises(ConfigError, match="OLIVE_SHARED_CACHE nope://x: Protocol not known"):
        Shared("nope://x")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependency, match=r"no package for s3:// here; run: pip install 'olive-onnx\[s3\]'"):
            Shared("s3://bucket/olive")


def test_no_cache_means_no_shared_one_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLIVE_SHARED_CACHE", f"file://{tmp_path}/shared")
    monkeypatch.setenv("OLIVE_CACHE_DIR", os.devnull + "/none")
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--verify", "files", "--no_cache"]
    assert main(argv) == 0
    assert not (tmp_path / "shared").exists()
