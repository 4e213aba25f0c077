"""The lock of an output, and ``olive reproduce``: the same bytes again, or what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from olive.cli import main
from olive.lock import places, workflow_of
from olive.model import digests, read_manifest
from places import LAB_MODEL, TRAVEL

pytestmark = pytest.mark.usefixtures("cache")


def lock_of(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(f"{out.name}.lock.json").read_text())


def run(out: Path, model: Path, *more: str) -> Path:
    """Make an output quickly; return its lock file."""
    assert main(["quantize", "-m", str(model), "-o", str(out), "--verify", "files", *more]) == 0
    return out.with_name(f"{out.name}.lock.json")


def edit(file: Path, **changes: Any) -> Path:
    """Change parts of a lock file; return the new file."""
    other = file.with_name("edited.lock.json")
    other.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return other


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Return a copy of the lab's model, to be changed and moved."""
    return Path(shutil.copytree(LAB_MODEL, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of calibration text."""
    file = tmp_path / "words.txt"
    file.write_text(TRAVEL.read_text())
    return file


def with_data(text: Path) -> list[str]:
    return ["--algorithm", "kquant", "--data_files", str(text), "--max_samples", "2", "--max_seq_len", "32"]


def test_the_lock_tells_all_that_the_run_depended_on(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    file = run(out, LAB_MODEL, *with_data(text), "--seed", "3")
    lock = lock_of(out)
    assert lock["source"]["files"] == digests(LAB_MODEL)
    assert lock["data"] == {"words.txt": {"path": str(text), "digest": digests(tmp_path)["words.txt"]}}
    assert lock["workflow"]["seed"] == 3
    assert lock["workflow"]["compute_device"] in ("cpu", "cuda")
    assert lock["workflow"]["passes"][0]["type"] == "kquant"
    assert lock["files"] == digests(out)
    manifest = read_manifest(out)
    assert manifest is not None
    assert [step["key"] for step in lock["steps"]] == [step["key"] for step in manifest["made_by"]["steps"]]
    assert lock["versions"].items() >= manifest["made_by"]["libraries"].items()
    assert lock["machine"].keys() >= {"cpu", "cpus", "memory", "os", "python"}
    assert json.loads((tmp_path / "out.report.json").read_text())["lock"] == lock
    assert file.read_bytes().startswith(b'{\n "format": "olive-lock"')  # so it is known as ours when it is replaced


def test_a_run_from_the_cache_has_the_same_lock_but_for_saying_so(tmp_path: Path) -> None:
    run(tmp_path / "out", LAB_MODEL)
    first = lock_of(tmp_path / "out")
    run(tmp_path / "out", LAB_MODEL)
    second = lock_of(tmp_path / "out")
    assert [step.pop("cached") for lock in (first, second) for step in lock["steps"]] == [False, True]
    assert first == second


def test_reproducing_gives_the_same_bytes(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    file = run(out, LAB_MODEL, *with_data(text))
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["reproduce", str(file)]) == 0
    assert capsys.readouterr().out == f"equal            {len(digests(out))} files, byte by byte\n"
    assert sorted(tmp_path.iterdir()) == before  # nothing is left of the second run
    assert main(["reproduce", str(file), "-o", str(tmp_path / "again")]) == 0
    assert digests(tmp_path / "again") == digests(out)


def test_reproducing_does_not_look_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run(tmp_path / "out", LAB_MODEL)
    monkeypatch.setenv("OLIVE_CACHE_DIR", str(tmp_path / "out.report.json" / "no-folder"))
    assert main(["reproduce", str(file)]) == 0


def test_what_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run(tmp_path / "out", LAB_MODEL)
    lock = lock_of(tmp_path / "out")
    files = {name: digest for name, digest in lock["files"].items() if name != "tokenizer.json"}
    files |= {"config.json": "0" * 64, "more.bin": "0" * 64}
    versions, machine = lock["versions"] | {"torch": "1.0"}, lock["machine"] | {"cpu": "Another"}
    capsys.readouterr()
    assert main(["reproduce", str(edit(file, files=files, versions=versions, machine=machine))]) == 3
    said = capsys.readouterr()
    assert "differs          config.json\nonly in the lock more.bin\nonly here        tokenizer.json\n" in said.out
    assert "torch            1.0 in the lock, " in said.out
    assert "cpu              Another in the lock, " in said.out
    assert "error: 3 of " in said.err and "came from a cache" not in said.err
    steps = [step | {"cached": True} for step in lock["steps"]]
    assert main(["reproduce", str(edit(file, files=files, steps=steps))]) == 3
    assert "in the locked run rtn came from a cache" in capsys.readouterr().err


def test_another_model_is_refused(tmp_path: Path, lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run(tmp_path / "out", lab)
    moved = tmp_path / "elsewhere"
    lab.rename(moved)
    capsys.readouterr()
    assert main(["reproduce", str(file)]) == 2
    assert f"model: not at {lab}; say where it lies with --model PATH" in capsys.readouterr().err
    assert main(["reproduce", str(file), "--model", str(moved)]) == 0
    (moved / "generation_config.json").write_text("{}")
    assert main(["reproduce", str(file), "--model", str(moved)]) == 2
    assert f"not the inputs that the lock names; these differ from them:\nmodel {moved}: generation_config.json" in (
        capsys.readouterr().err
    )


def test_an_adapter_is_an_input_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--data_files", str(TRAVEL), "--text_template", "{prompt} {response}", "--max_steps", "1"]
    tuned, out = tmp_path / "ft", tmp_path / "onnx"
    assert main(["finetune", "-m", str(LAB_MODEL), "-o", str(tuned), *rows, "--max_samples", "8"]) == 0
    pair = ["-m", str(tuned / "model"), "-a", str(tuned / "adapter")]
    assert main(["auto-opt", *pair, "-o", str(out), "--verify", "files"]) == 0
    moved = tmp_path / "elsewhere" / "adapter"
    moved.parent.mkdir()
    (tuned / "adapter").rename(moved)
    file = str(tmp_path / "onnx.lock.json")
    capsys.readouterr()
    assert main(["reproduce", file]) == 2
    said = f"adapter_path: not at {tuned / 'adapter'}; say where it lies with --adapter_path PATH"
    assert said in capsys.readouterr().err
    assert main(["reproduce", file, "-a", str(moved)]) == 0
    renamed = moved.rename(moved.with_name("other"))
    assert main(["reproduce", file, "-a", str(renamed)]) == 2
    assert f"model {tuned / 'model'}: its adapter, in name or contents" in capsys.readouterr().err


def test_other_data_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run(tmp_path / "out", LAB_MODEL, *with_data(text))
    moved = tmp_path / "moved.txt"
    text.rename(moved)
    capsys.readouterr()
    assert main(["reproduce", str(file)]) == 2
    assert f"data words.txt: not at {text}; say where it lies with --data words.txt=PATH" in capsys.readouterr().err
    assert main(["reproduce", str(file), "--data", f"words.txt={moved}"]) == 0
    moved.write_text("other words")
    assert main(["reproduce", str(file), "--data", f"words.txt={moved}"]) == 2
    assert f"these differ from them:\ndata words.txt: {moved}" in capsys.readouterr().err
    assert main(["reproduce", str(file), "--data", f"word.txt={moved}"]) == 2
    assert "--data word.txt: the lock has no data of this name; did you mean 'words.txt'?" in capsys.readouterr().err
    assert main(["reproduce", str(file), "--data", str(moved)]) == 2
    assert "give NAME=PATH" in capsys.readouterr().err


def test_what_is_no_lock_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "out", LAB_MODEL)
    report = tmp_path / "out.report.json"
    for argv, words in (([], "give a lock file"), ([str(report)], f"{report}: not a lock file; Olive writes one")):
        assert main(["reproduce", *argv]) == 2
        assert words in capsys.readouterr().err
    assert main(["reproduce", str(edit(tmp_path / "out.lock.json", format_version=99))]) == 2
    assert "a lock file of version 99; this Olive reads version 1" in capsys.readouterr().err


def test_a_lock_that_was_changed_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run(tmp_path / "out", LAB_MODEL)
    for part in ("workflow", "source", "data", "steps", "olive", "versions", "machine", "files"):
        assert main(["reproduce", str(edit(file, **{part: "cut"}))]) == 2
        assert f"edited.lock.json: {part}: input should be a valid " in capsys.readouterr().err
    for changes, place in (
        ({"data": {"words.txt": {"digest": "0"}}}, "data.words.txt.path"),
        ({"workflow": {"input_model": {}, "passes": []}}, "workflow.output_dir"),
        ({"steps": [{"pass": "rtn"}]}, "steps.0.cached"),
    ):
        assert main(["reproduce", str(edit(file, **changes))]) == 2
        assert f"{place}: field required; the lock was changed or cut" in capsys.readouterr().err


def test_code_of_a_checkpoint_runs_only_if_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run(tmp_path / "out", LAB_MODEL, "--trust_remote_code")
    capsys.readouterr()
    assert main(["reproduce", str(file)]) == 2
    assert "look at that code, then give --trust_remote_code" in capsys.readouterr().err
    assert main(["reproduce", str(file), "--trust_remote_code"]) == 0


def test_statistics_are_an_input_and_saving_them_is_not_repeated(tmp_path: Path, text: Path) -> None:
    kept, awq = tmp_path / "kept", ["--algorithm", "awq", "--group_size", "64"]
    first = run(tmp_path / "a", LAB_MODEL, *awq, *with_data(text)[2:], "--save_statistics", str(kept))
    second = run(tmp_path / "b", LAB_MODEL, *awq, "--statistics", str(kept))
    assert lock_of(tmp_path / "b")["data"]["kept"]["path"] == str(kept)
    assert main(["reproduce", str(first)]) == 0
    moved = tmp_path / "moved"
    kept.rename(moved)
    assert main(["reproduce", str(second)]) == 2
    assert main(["reproduce", str(second), "--data", f"kept={moved}"]) == 0


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / name / "rows.txt" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"words of {file.parent.name} " * 200)
    options = with_data(files[0])
    options[3:4] = map(str, files)
    run(tmp_path / "out", LAB_MODEL, *options)
    lock = lock_of(tmp_path / "out")
    assert {name: entry["path"] for name, entry in lock["data"].items()} == {
        "rows.txt": str(files[0]), "rows.txt-2": str(files[1]),
    }  # fmt: skip
    other = tmp_path / "c.txt"
    other.write_text("words")
    where = places(lock, {"rows.txt-2": str(other)})
    assert workflow_of(lock, where, Path("o"))["passes"][0]["data"]["files"] == [str(files[0]), str(other)]


def test_a_dataset_of_the_hub_cannot_be_moved() -> None:
    lock = {"data": {"owner/rows": {"dataset": "owner/rows", "digest": "d"}}}
    assert places(lock, {}) == {}
    with pytest.raises(Exception, match="--data owner/rows: the lock has no data of this name"):
        places(lock, {"owner/rows": "x"})


def test_files_of_others_beside_an_output_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("out.lock.json", "out.report.html"):
        mine = tmp_path / name
        mine.write_text("mine")
        argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--verify", "files"]
        assert main(argv) == 2
        assert f"{mine}: is in the way of the {name.split('.')[1]} and not one of ours" in capsys.readouterr().err
        mine.unlink()
