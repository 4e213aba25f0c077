"""The cache as a whole: listed, kept small without taking what is in use, verified, explained."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import yaml

from olive.cache import Cache
from olive.cli import main
from olive.errors import ConfigError
from olive.inventory import collect, damaged, in_use, items, read_size, total
from olive.lineage import describe, differences, nearest
from olive.model import digests
from places import LAB_MODEL

SPAWN = multiprocessing.get_context("spawn")
KEYS = ["aa" * 32, "bb" * 32, "cc" * 32]


def put(cache: Cache, key: str, size: int = 10, age: int = 0, **record: Any) -> None:
    with cache.stage(key) as staged:
        (staged / "files" / "weights").write_bytes(os.urandom(size))
        cache.put(key, staged, {"pass": "rtn", "files": digests(staged / "files"), **record})
    then = time.time() - age
    os.utime(cache.folder(key) / "step.json", (then, then))


def filled(root: Path) -> Cache:
    """Return a cache of three entries of 1000 bytes, used three, two and one hour ago."""
    cache = Cache(root)
    for number, key in enumerate(KEYS):
        put(cache, key, 1000, age=3600 * (3 - number))
    return cache


def left(cache: Cache) -> set[str]:
    return {item.key for item in items(cache)}


def files_size(cache: Cache) -> int:
    """The oracle: every file of the store, as du would count."""
    found = {}
    for path in [*(cache.root / "entries").rglob("*"), *(cache.root / "scratch").rglob("*")]:
        if path.is_file():
            found[path.stat().st_ino] = path.stat().st_size
    return sum(found.values())


def test_entries_are_listed_the_longest_unused_first(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert [item.key for item in items(cache)] == KEYS
    assert total(items(cache)) == files_size(cache)
    cache.get(KEYS[0])
    assert [item.key for item in items(cache)] == [*KEYS[1:], KEYS[0]]


def test_looking_for_an_entry_does_not_count_as_use(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert cache.has(KEYS[0]) == "here"
    assert cache.has("dd" * 32) is None
    assert [item.key for item in items(cache)] == KEYS


def test_collecting_removes_the_longest_unused_until_the_size_fits(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    whole = files_size(cache)
    assert collect(cache, whole).removed == ()
    done = collect(cache, whole - 1)
    assert [item.key for item in done.removed] == KEYS[:1]
    assert done.size == files_size(cache)
    assert done.freed == whole - done.size
    collect(cache, 0)
    assert left(cache) == set()
    assert files_size(cache) == 0
    assert cache.get(KEYS[2]) is None


def test_files_that_entries_and_outputs_share_are_counted_once(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache")
    source = cache.folder(KEYS[0]) / "files" / "weights"
    other = cache.folder(KEYS[1]) / "files" / "weights"
    other.unlink()
    other.hardlink_to(source)
    assert total(items(cache)) == files_size(cache)
    (tmp_path / "output").hardlink_to(cache.folder(KEYS[2]) / "files" / "weights")
    whole = files_size(cache)
    done = collect(cache, 0)
    assert done.size == 0
    assert done.freed == whole - 1000  # what the output holds too stays on the disk
    assert (tmp_path / "output").stat().st_size == 1000


def test_what_an_interrupted_step_left_is_removed_too_when_its_turn_comes(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    unfinished = tmp_path / "scratch" / ("dd" * 32)
    unfinished.mkdir(parents=True)
    (unfinished / "layer").write_bytes(bytes(1000))
    os.utime(unfinished, (1, 1))
    assert items(cache)[0].kind == "unfinished"
    collect(cache, files_size(cache) - 1)
    assert left(cache) == set(KEYS)


def use(root: str, key: str, took: Event, done: Event) -> None:
    cache = Cache(Path(root))
    with cache.using():
        assert cache.get(key) is not None
        took.set()
        done.wait(60)


def build(root: str, key: str, took: Event, done: Event) -> None:
    with Cache(Path(root)).lock(key):
        took.set()
        done.wait(60)


@pytest.mark.parametrize("holder", [use, build])
def test_what_another_process_uses_or_builds_stays_until_it_is_gone(tmp_path: Path, holder: Any) -> None:
    cache = filled(tmp_path)
    took, done = SPAWN.Event(), SPAWN.Event()
    other = SPAWN.Process(target=holder, args=(str(tmp_path), KEYS[0], took, done))
    other.start()
    try:
        assert took.wait(60)
        removed = collect(cache, 0)
        assert removed.in_use == 1
        assert left(cache) == {KEYS[0]}
        assert removed.size == files_size(cache)
    finally:
        os.kill(other.pid or 0, signal.SIGKILL)  # no chance to let go: the system drops its locks
        other.join()
    assert in_use(cache) == set()
    assert collect(cache, 0).in_use == 0
    assert left(cache) == set()


def test_an_entry_made_within_a_run_is_in_use_as_well(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path), Cache(tmp_path)
    with cache.using():
        put(cache, KEYS[0])
        assert in_use(other) == {KEYS[0]}
    assert in_use(other) == set()
    assert not list((tmp_path / "locks" / "used").iterdir())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "files" / "weights").unlink(), "weights: No such file"),
        (lambda folder: (folder / "files" / "extra").write_text("x"), "extra: not in the record"),
        (lambda folder: (folder / "step.json").write_text("{"), "step.json: not a record of a step"),
        (lambda folder: (folder / "step.json").write_text("{}"), "step.json: not a record of a step"),
    ],
)
def test_verify_names_what_is_damaged_and_removes_it_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    monkeypatch.setenv("OLIVE_CACHE_DIR", str(tmp_path))
    cache = filled(tmp_path)
    assert main(["cache", "verify"]) == 0
    assert "3 entries, all as they were made" in capsys.readouterr().out
    damage(cache.folder(KEYS[1]))
    assert main(["cache", "verify"]) == 3
    said = capsys.readouterr()
    assert f"{KEYS[1][:12]}" in said.out and words in said.out
    assert "1 of 3 entries are damaged; remove them with --repair" in said.err
    assert left(cache) == set(KEYS)
    assert main(["cache", "verify", "--repair"]) == 0
    assert left(cache) == {KEYS[0], KEYS[2]}
    assert main(["cache", "verify"]) == 0


def test_verify_reads_files_whose_size_and_time_did_not_change(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    file = cache.folder(KEYS[0]) / "files" / "weights"
    stat = file.stat()
    file.chmod(0o644)
    file.write_bytes(bytes(1000))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [item.key for item, _ in damaged(cache)] == [KEYS[0]]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("12", 12), ("50GB", 50 * 10**9), ("1.5 GiB", 3 * 2**29), ("2kb", 2000)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert read_size(text, "--max_size") == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB"])
def test_a_wrong_size_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="give a number and a unit, as in 500MB, 50GB or"):
        read_size(text, "--max_size")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gc"], "give the size to keep under, as in --max_size 50GB"),
        (["why"], "give the start of a key"),
        (["why", "abc"], "abc: no entry of the cache has a key that starts so"),
        (["ls", "--repair"], "olive cache ls: --repair: only olive cache verify takes it"),
        (["gc", "x", "--max_size", "1MB"], "olive cache gc: x: only olive cache why takes it"),
    ],
)
def test_wrong_uses_are_told(cache: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    assert main(["cache", *argv]) == 2
    assert words in capsys.readouterr().err


PARTS = {"pass": "rtn", "options": {"bits": 4, "overrides": {"*.o_proj": "8"}}, "input": "1" * 64,
         "versions": {"torch": "2.1"}, "code": {"olive.quant.affine": "2" * 64}, "data": {"x": "3" * 64}}  # fmt: skip


def test_differences_name_each_part_once() -> None:
    other = json.loads(json.dumps(PARTS))
    assert differences(PARTS, other) == []
    other["options"] = {"bits": 8, "overrides": {}, "text_template": "{a}\n{b}"}
    other["versions"]["torch"] = "2.2"
    other["code"]["olive.quant.affine"] = other["input"] = other["data"]["x"] = "4" * 64
    assert [str(difference) for difference in differences(PARTS, other)] == [
        "options.bits is 4, there 8",
        "options.overrides is not given, there none",
        "options.overrides.*.o_proj is 8, there not given",
        'options.text_template is not given, there "{a}\\n{b}"',
        "the contents of data.x differ",
        "the input differs",
        "versions.torch is 2.1, there 2.2",
        "the code of olive.quant.affine differs",
    ]


def test_the_nearest_entry_is_of_the_same_pass_and_differs_least(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key, changes in zip(KEYS, ({"seed": 1}, {"pass": "hqq"}, {"seed": 1, "device": "cuda"}), strict=True):
        put(cache, key, parts=PARTS | changes)
    found = nearest(PARTS, items(cache))
    assert found is not None
    assert found[0].key == KEYS[0]
    assert [str(difference) for difference in found[1]] == ["seed is not given, there 1"]
    assert nearest(PARTS | {"pass": "awq"}, items(cache)) is None
    assert "does not say" in " ".join(describe({"pass": "rtn"}))


def workflow(tmp_path: Path, **options: Any) -> str:
    file = tmp_path / "w.yaml"
    steps = [{"type": "rtn", **options}, {"type": "dequantize"}]
    data = {"input_model": {"path": str(LAB_MODEL)}, "passes": steps, "verify": {"level": "files"},
            "output_dir": str(tmp_path / "out")}  # fmt: skip
    file.write_text(yaml.safe_dump(data))
    return str(file)


@pytest.mark.usefixtures("cache")
def test_why_tells_from_what_a_key_is_made_and_what_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", workflow(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["cache", "ls"]) == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert rows.keys() == {"rtn", "dequantize", "verify"}
    assert main(["cache", "why", rows["rtn"].split()[0]]) == 0
    told = capsys.readouterr().out
    assert "options            bits 4\n" in told
    assert f"input              the model {LAB_MODEL.name} (" in told
    assert "                   model.safetensors " in told
    assert "code               olive.passes.quantizer " in told
    assert main(["cache", "why", rows["dequantize"].split()[0]]) == 0
    assert f"input              step {rows['rtn'].split()[0]} (rtn)\n" in capsys.readouterr().out
    assert main(["cache", "why", workflow(tmp_path)]) == 0
    assert capsys.readouterr().out.count("same key in the cache") == 2
    assert main(["cache", "why", workflow(tmp_path, bits=8)]) == 0
    told = capsys.readouterr().out
    assert "not in the cache\n" in told and "  - options.bits is 8, there 4\n" in told
    assert "  - the input differs\n" in told
    assert main(["plan", workflow(tmp_path, bits=8)]) == 0
    assert "nearest is" in capsys.readouterr().out


def test_a_template_has_no_key_to_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("input_model: {path: m}\npasses: [{type: rtn, bits: {choice: [4, 8]}}]\n")
    assert main(["cache", "why", str(file)]) == 2
    assert "t.yaml: has holes" in capsys.readouterr().err


def test_a_cap_from_the_environment_is_kept_after_each_run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLIVE_CACHE_MAX_SIZE", "1kB")
    assert main(["run", workflow(tmp_path)]) == 0
    assert files_size(Cache(cache)) <= 1000
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setenv("OLIVE_CACHE_MAX_SIZE", "plenty")  # told before anything runs
    assert main(["run", workflow(tmp_path)]) == 2
    assert "OLIVE_CACHE_MAX_SIZE plenty: give a number and a unit" in capsys.readouterr().err


def test_of_two_processes_with_one_workflow_one_builds_and_one_takes_its_result(tmp_path: Path, cache: Path) -> None:
    file = workflow(tmp_path)
    argv = [[sys.executable, "-m", "olive", "run", file, "-o", str(tmp_path / name)] for name in ("one", "two")]
    both = [subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for own in argv]
    assert [process.wait(500) for process in both] == [0, 0], [p.stderr.read() for p in both if p.stderr]
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("one", "two")]
    for one, other in zip(*(report["steps"] for report in reports), strict=True):
        assert one["key"] == other["key"]
        assert sorted([one["cached"], other["cached"]]) == [False, True]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert damaged(Cache(cache)) == []
