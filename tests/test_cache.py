"""The store: whole entries or none, shared bytes that an edit cannot reach, damage that is noticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from olive import cache as caches
from olive.cache import LINK_ABOVE, Cache, check_replaceable, lay, swap
from olive.errors import ConfigError, PassError
from olive.model import digests

KEY = "ab" * 32


def put(cache: Cache, key: str = KEY, text: str = "made") -> None:
    with cache.stage(key) as staged:
        (staged / "files" / "model.txt").write_text(text)
        cache.put(key, staged, {"pass": "rtn", "files": digests(staged / "files")})


def test_an_entry_is_there_only_once_it_is_put(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.stage(KEY) as staged:
        (staged / "files" / "half").write_text("half")
        assert cache.get(KEY) is None
    assert cache.get(KEY) is None
    assert not staged.exists()
    put(cache)
    entry = cache.get(KEY)
    assert entry is not None
    assert (entry.files / "model.txt").read_text() == "made"
    assert not (entry.files / "model.txt").stat().st_mode & 0o222


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    left = tmp_path / "building" / f"{KEY[:16]}.{child.pid}"
    alive = tmp_path / "building" / f"{KEY[:16]}.{os.getppid()}"
    for folder in (left, alive):
        (folder / "files").mkdir(parents=True)
    put(cache, "cd" * 32)
    assert not left.exists()
    assert alive.exists()


def test_a_changed_or_broken_entry_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    put(cache)
    entry = cache.get(KEY)
    assert entry is not None
    file = entry.files / "model.txt"
    file.chmod(0o644)
    file.write_text("changed")
    assert cache.get(KEY) is None
    assert not file.exists()
    put(cache)
    (file.parent.parent / "step.json").write_text("{")
    with pytest.raises(PassError, match="broken cache entry"):
        cache.get(KEY)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(LINK_ABOVE))
    cache = Cache(tmp_path / "cache")
    first = cache.digest(file)
    read: list[Path] = []
    original = caches.sha256
    monkeypatch.setattr(caches, "sha256", lambda path: read.append(path) or original(path))
    assert Cache(tmp_path / "cache").digest(file) == first
    assert read == []
    time.sleep(0.01)
    file.write_bytes(b"\1" * LINK_ABOVE)
    assert Cache(tmp_path / "cache").digest(file) != first
    assert read == [file]


def test_large_read_only_files_are_shared_and_all_others_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_reflink", lambda *_: False)
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "sub").mkdir(parents=True)
    for name, size, mode in (("locked", LINK_ABOVE, 0o444), ("sub/open", LINK_ABOVE, 0o644), ("small", 9, 0o444)):
        (source / name).write_bytes(bytes(size))
        (source / name).chmod(mode)
    lay(source, target)
    assert digests(source) == digests(target)
    shared = {n for n in digests(source) if (source / n).stat().st_ino == (target / n).stat().st_ino}
    assert shared == {"locked"}
    assert (target / "small").stat().st_mode & stat.S_IWUSR


@pytest.mark.parametrize("exchange", [True, False])
def test_swapping_replaces_a_folder_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(caches, "_exchange", lambda *_: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    swap(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["old", "old/new"]


def test_only_unchanged_folders_of_ours_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_replaceable(out, overwrite=False)
    out.mkdir()
    check_replaceable(out, overwrite=False)
    (out / "a").write_text("a")
    with pytest.raises(ConfigError, match="already holds something else"):
        check_replaceable(out, overwrite=False)
    (out / "olive.json").write_text(json.dumps({"format": "olive", "files": digests(out)}))
    check_replaceable(out, overwrite=False)
    (out / "a").write_text("b")
    with pytest.raises(ConfigError, match="a was changed or added"):
        check_replaceable(out, overwrite=False)
    check_replaceable(out, overwrite=True)


@pytest.mark.parametrize("text", ["[]", '{"files": 3}', "3"])
def test_a_record_or_a_memory_that_is_none_is_no_defect(text: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "digests.json").write_text("[]")
    assert len(cache.digest(tmp_path / "file")) == 64
    cache.folder("ab").mkdir(parents=True)
    (cache.folder("ab") / "step.json").write_text(text)
    with pytest.raises(PassError, match=r"broken cache entry .*not a record of a step"):
        cache.get("ab")


@pytest.mark.parametrize("added", [".env", ".git/HEAD", "notes/", "broken", "sub/notes/"])
def test_a_folder_of_ours_that_somebody_added_to_is_not_replaced(added: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "a").write_text("a")
    (out / "olive.json").write_text(json.dumps({"format": "olive", "files": digests(out)}))
    check_replaceable(out, overwrite=False)
    if added == "broken":
        (out / added).symlink_to("nowhere")
    elif added.endswith("/"):
        (out / added).mkdir()
    else:
        (out / added).parent.mkdir(exist_ok=True)
        (out / added).write_text("mine")
    with pytest.raises(ConfigError, match="was changed or added"):
        check_replaceable(out, overwrite=False)
    check_replaceable(out, overwrite=True)


def test_an_output_takes_the_files_of_a_store_that_ends_with_the_run(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    (source / "own").write_text("1")
    (source / "shared").write_text("2")
    (tmp_path / "elsewhere").hardlink_to(source / "shared")
    lay(source, target, move=True)
    assert sorted(path.name for path in source.iterdir()) == ["shared"]
    assert (target / "own").read_text() == "1"
    (target / "shared").chmod(0o644)
    (target / "shared").write_text("changed")
    assert (tmp_path / "elsewhere").read_text() == "2"
