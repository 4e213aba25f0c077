"""The commands on the shipped model: what they write, what they refuse, with which words and exit code."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from olive.cli import main
from olive.config import dump, load
from olive.errors import ConfigError
from olive.model import digests, read_manifest
from olive.passes import PASSES
from olive.schema import FILE
from places import LAB_MODEL, TEMPLATE, TRAVEL

QUICK = ["--verify", "files"]


pytestmark = pytest.mark.usefixtures("cache")


def copy(tmp_path: Path, *without: str) -> Path:
    """Copy the lab's model, without some files."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(LAB_MODEL, folder, ignore=lambda *_: set(without))
    return folder


def quantize(model: Path | str, out: Path, *more: str) -> int:
    return main(["quantize", "-m", str(model), "-o", str(out), *QUICK, *more])


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    """Run a command that must fail with ``code``; return what it said."""
    assert main(argv) == code
    return capsys.readouterr().err


def test_quantize_writes_the_bits_it_was_asked_for(tmp_path: Path) -> None:
    for precision, bits in (("int4", 4), ("int8", 8)):
        out = tmp_path / precision
        assert quantize(LAB_MODEL, out, "--precision", precision) == 0
        manifest = read_manifest(out)
        assert manifest is not None
        assert set(manifest["bits"].values()) == {bits}
        assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == bits
        assert manifest["files"] == digests(out)
        assert str(tmp_path) not in (out / "olive.json").read_text()


def test_a_repeated_run_is_cached_and_byte_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert quantize(LAB_MODEL, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "rtn          cached" not in capsys.readouterr().out
    assert quantize(LAB_MODEL, out) == 0
    assert "rtn          cached" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.rmtree(out)
    assert quantize(LAB_MODEL, out, "--no_cache") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_edit_of_an_output_does_not_reach_the_cache_or_the_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = copy(tmp_path)
    assert quantize(source, out) == 0
    originals = digests(source)
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_text("edited")
    assert digests(source) == originals
    assert quantize(source, tmp_path / "again") == 0
    assert "edited" not in (tmp_path / "again" / "config.json").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(LAB_MODEL, tmp_path / "out", "--dry_run") == 0
    assert "run        rtn" in capsys.readouterr().out
    assert quantize(LAB_MODEL, tmp_path / "out") == 0
    capsys.readouterr()
    assert quantize(LAB_MODEL, tmp_path / "out", "--dry_run") == 0
    assert "cached     rtn" in capsys.readouterr().out


def test_the_saved_workflow_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.yaml"
    options = ["--group_size", "64", "--symmetric", "--save_config_file", str(file)]
    assert quantize(LAB_MODEL, tmp_path / "out", *options) == 0
    before = digests(tmp_path / "out")
    capsys.readouterr()
    assert main(["run", str(file), "-o", str(tmp_path / "again")]) == 0
    assert "rtn          cached" in capsys.readouterr().out
    assert digests(tmp_path / "again") == before


def test_a_workflow_file_runs_several_passes(tmp_path: Path) -> None:
    rows = {"name": "json", "files": [str(TRAVEL)], "text_template": "{prompt}{response}", "max_samples": 4,
            "max_seq_len": 64}  # fmt: skip
    workflow = {
        "input_model": {"path": str(LAB_MODEL)},
        "data": {"rows": rows},
        "passes": [{"type": "awq", "group_size": 64, "data": "rows"}, {"type": "decoder"}],
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(workflow))
    assert main(["run", str(file)]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["kind"] == "onnx"
    assert manifest["verification"]["level"] == "full"
    assert manifest["verification"]["kl_divergence"] < 0.5
    assert [step["pass"] for step in manifest["made_by"]["steps"]] == ["awq", "decoder"]
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()


def test_group_sizes_that_do_not_divide_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(LAB_MODEL, tmp_path / "out", "--group_size", "192") == 0
    assert "group size 128" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert set(manifest["fallbacks"].values()) == {"group size 128"}


def test_a_quantized_base_is_made_float_again(tmp_path: Path) -> None:
    assert quantize(LAB_MODEL, tmp_path / "q") == 0
    assert main(["dequantize", "-m", str(tmp_path / "q"), "-o", str(tmp_path / "f")]) == 0
    import torch
    from transformers import AutoModelForCausalLM

    from olive.quant.formats.checkpoint import Checkpoint

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f")
    packed = Checkpoint(tmp_path / "q")
    name = packed.quantized[0]
    assert model.dtype == torch.float32
    assert torch.equal(model.get_submodule(name).weight.data, packed.quantized_weight(name).dequantize())


def test_verification_fails_with_its_own_code_and_keeps_the_previous_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(LAB_MODEL, out) == 0
    before = digests(out)
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(out), "--group_size", "256", "--max_kl", "1e-6"]
    assert "KL divergence from the source" in refusal(capsys, argv, code=3)
    assert digests(out) == before


def test_a_cached_model_can_be_verified_again(tmp_path: Path) -> None:
    argv = ["auto-opt", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out")]
    for level in ("full", "files"):
        assert main([*argv, "--verify", level]) == 0
    import onnx

    onnx.checker.check_model(str(tmp_path / "out" / "model" / "model.onnx"))
    onnx.load(tmp_path / "out" / "model" / "model.onnx")


def test_the_manifest_names_no_places(tmp_path: Path) -> None:
    argv = [
        "finetune",
        "-m",
        str(LAB_MODEL),
        "-o",
        str(tmp_path / "ft"),
        "--data_files",
        str(TRAVEL),
        "--max_steps",
        "1",
    ]
    assert main([*argv, "--text_template", TEMPLATE, "--max_samples", "8"]) == 0
    adapter = str(tmp_path / "ft" / "adapter")
    base = str(tmp_path / "ft" / "model")
    assert main(["auto-opt", "-m", base, "-a", adapter, "-o", str(tmp_path / "onnx"), *QUICK]) == 0
    for file in (*tmp_path.glob("*/olive.json"), tmp_path / "ft" / "adapter" / "adapter_config.json"):
        assert str(tmp_path) not in file.read_text(), file
        assert str(TRAVEL.parent) not in file.read_text(), file


def test_an_adapter_is_neither_lost_nor_trained_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data_files", str(TRAVEL), "--text_template", TEMPLATE, "--max_steps", "1", "--max_samples", "8"]
    assert main(["finetune", "-m", str(LAB_MODEL), "-o", str(tmp_path / "ft"), *argv]) == 0
    tuned = ["-m", str(tmp_path / "ft"), "-o", str(tmp_path / "out")]
    assert "has an adapter already" in refusal(capsys, ["finetune", *tuned, *argv])
    assert "which quantize would lose" in refusal(capsys, ["quantize", *tuned])


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data_files", str(TRAVEL), "--text_template", TEMPLATE, "--max_steps", "1", "--max_samples", "8"]
    assert main(["finetune", "-m", str(LAB_MODEL), "-o", str(tmp_path / "ft"), *argv]) == 0
    assert quantize(LAB_MODEL, tmp_path / "other") == 0
    pair = ["-m", str(tmp_path / "other"), "-a", str(tmp_path / "ft" / "adapter"), "-o", str(tmp_path / "out")]
    assert "another base" in refusal(capsys, ["auto-opt", *pair])
    assert not (tmp_path / "out").exists()


MODEL_AND_OUT = ["-m", str(LAB_MODEL), "-o", "out"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantise", *MODEL_AND_OUT], ["unknown command 'quantise'", "did you mean 'quantize'"]),
        (["quantize", *MODEL_AND_OUT, "--algoritm", "rtn"], ["--algoritm", "did you mean '--algorithm'"]),
        (["quantize", *MODEL_AND_OUT, "stray"], ["unexpected argument 'stray'"]),
        (["quantize", "-o", "out"], ["--model_name_or_path (-m) is required"]),
        (["quantize", "-m", str(LAB_MODEL)], ["--output_path (-o) is required"]),
        (
            ["quantize", *MODEL_AND_OUT, "--algorithm", "awq", "--precision", "int8"],
            ["awq", "8 bits", "these do: gptq"],
        ),
        (["quantize", *MODEL_AND_OUT, "--format", "awq", "--precision", "int8"], ["awq layout does not hold 8 bits"]),
        (["quantize", *MODEL_AND_OUT, "--group_size", "8"], ["group_size", "at least 16"]),
        (["quantize", *MODEL_AND_OUT, "--exclude", "*.nothing"], ["no linear layer is named like '*.nothing'"]),
        (["quantize", *MODEL_AND_OUT, "--exclude", "*"], ["exclude: no linear layer is left to quantize"]),
        (["quantize", *MODEL_AND_OUT, "--data_files", "x.txt"], ["rtn uses no data"]),
        (["quantize", "-m", "no/such/folder", "-o", "out"], ["no/such/folder: no such model folder"]),
        (["quantize", "-m", "owner/unknown", "-o", "out"], ["owner/unknown", "cache"]),
        (
            ["quantize", "-m", "azureml://registries/r/models/m/versions/1", "-o", "out"],
            ["azureml://", "not built yet"],
        ),
        (["finetune", *MODEL_AND_OUT], ["give data to train on"]),
        (["auto-opt", *MODEL_AND_OUT, "--adapter_path", "nowhere"], ["nowhere", "no adapter_config.json"]),
        (
            ["auto-opt", *MODEL_AND_OUT, "--device", "gpu", "--provider", "CPUExecutionProvider"],
            ["provider CPUExecutionProvider does not run on device gpu", "CUDAExecutionProvider"],
        ),
        (
            ["auto-opt", *MODEL_AND_OUT, "--provider", "CUDAExecutionProvider"],
            ["CUDAExecutionProvider does not run on device cpu", "use CPUExecutionProvider"],
        ),
        (["finetune", *MODEL_AND_OUT, "--data_file", "x"], ["--data_file", "did you mean '--data_files'"]),
        (["generate", "-m", str(LAB_MODEL), "-p", "x"], ["is not an ONNX model", "auto-opt"]),
        (["run", "nothing.yaml"], ["nothing.yaml: no such file"]),
        (["run"], ["give a workflow file"]),
        (["convert-adapters", "-a", "a", "-m", "b"], ["--output_path is required"]),
    ],
)
def test_bad_arguments_are_named(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"passess": []}, ["passess: unknown option", "did you mean 'passes'"]),
        ({"passes": [{"type": "rtnn"}]}, ["passes.0", "unknown pass 'rtnn'", "did you mean 'rtn'"]),
        ({"passes": [{"type": "rtn", "bit": 4}]}, ["passes.0.bit: unknown option", "did you mean 'bits'"]),
        ({"passes": [{"type": "rtn", "bits": 5}]}, ["passes.0.bits", "got 5"]),
        ({"passes": [{"type": "awq", "data": "missing"}]}, ["no data set is called 'missing'"]),
        ({"passes": [{"type": "awq", "data": {"name": "text", "max_sampels": 3}}]}, ["did you mean 'max_samples'"]),
        ({"passes": [{"type": "decoder"}, {"type": "rtn"}]}, ["passes.1", "rtn works on hf models, but gets onnx"]),
        ({"passes": []}, ["expected a list of passes"]),
        ({"target": {"device": "cpu", "provder": "x"}}, ["target.provder", "did you mean 'provider'"]),
        ({"input_model": {}}, ["input_model.path: required"]),
        ({"input_model": "phi"}, ["input_model: expected a mapping of options (path, ", "got 'phi'"]),
        ({"passes": [{"type": "rtn"}, {"type": "kquant"}]}, ["the result of rtn: is already quantized (gptq)"]),
    ],
)
def test_mistakes_in_a_workflow_file_are_placed(
    change: dict, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {
        "input_model": {"path": str(LAB_MODEL)}, "passes": [{"type": "rtn"}], "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(good | change))
    said = refusal(capsys, ["run", str(file)])
    assert all(word in said for word in words), said


def test_broken_yaml_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("passes:\n  - {type: rtn\n")
    assert f"{file}:3:1: not YAML" in refusal(capsys, ["run", str(file)])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.yaml", "", "w.yaml: expected a mapping, got NoneType"),
        ("w.yaml", "- a\n", "w.yaml: expected a mapping, got list"),
        ("w.yaml", "passes: {type: rtn}\noutput_dir: o\n", "w.yaml: passes: expected a list of passes"),
        ("w.yaml", "passes:\n- {type: rtn, bits: 4, bits: 8}\n", "w.yaml:2:24: not YAML: 'bits' is given twice"),
        ("w.yaml", "seed: 1\npasses: []\nseed: 2\n", "w.yaml:3:1: not YAML: 'seed' is given twice"),
        ("w.yaml", "passes: &a [{type: rtn}, *a]\n", "w.yaml:1:26: not YAML: an alias of what holds it"),
        ("w.json", '{"passes": [{"type": "rtn", "bits": 4, "bits": 8}]}', "w.json: 'bits' is given twice"),
    ],
)
def test_files_that_are_no_workflow_are_named(
    name: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert said in refusal(capsys, ["run", str(tmp_path / name)])


def test_one_data_set_may_extend_another(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("a: &a {name: text}\nb: {<<: *a, name: json}\nc: *a\n")
    assert load(file) == {"a": {"name": "text"}, "b": {"name": "json"}, "c": {"name": "text"}}


def test_a_workflow_is_not_saved_over_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--dry_run", "--save_config_file"]
    assert "is a folder; give a file" in refusal(capsys, [*argv, str(tmp_path)])
    assert "exists with other contents" in refusal(capsys, [*argv, str(tmp_path / "binary")])


def test_names_that_cannot_be_written_beside_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", "-m", str(LAB_MODEL), *QUICK, "-o"]
    assert "the name is too long" in refusal(capsys, [*argv, str(tmp_path / ("x" * 240))])
    (tmp_path / "out" / "in").mkdir(parents=True)
    assert main([*argv, str(tmp_path / "out" / "in" / ".."), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        "out", "out.lock.json", "out.report.html", "out.report.json"]  # fmt: skip


def test_bad_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = copy(tmp_path), str(tmp_path / "out")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    said = refusal(capsys, ["quantize", "-m", str(folder), "-o", out])
    assert "model.safetensors: truncated" in said
    weights.write_bytes(b"garbage")
    assert "not a safetensors file" in refusal(capsys, ["quantize", "-m", str(folder), "-o", out])
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "architectures": ["Unheard"]}))
    assert "unheard_of" in refusal(capsys, ["quantize", "-m", str(folder), "-o", out])
    assert "Unheard is not supported" in refusal(capsys, ["auto-opt", "-m", str(folder), "-o", out])
    (folder / "config.json").unlink()
    assert "not a model folder" in refusal(capsys, ["quantize", "-m", str(folder), "-o", out])
    assert not Path(out).exists()


def test_a_missing_tokenizer_matters_only_where_one_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    assert quantize(folder, tmp_path / "rtn") == 0
    argv = ["-m", str(folder), "-o", str(tmp_path / "out")]
    assert "no tokenizer" in refusal(capsys, ["quantize", *argv, "--algorithm", "awq"])
    assert "tokenizer" in refusal(capsys, ["auto-opt", *argv])
    assert "no tokenizer" in refusal(capsys, ["quantize", *argv])  # full verification generates text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "response": "b"}', '{"prompt": "a", '], ["rows.jsonl:2", "JSON"]),
        (['{"prompt": "a", "answer": "b"}'], ["response", "prompt, answer", "rows.jsonl:1"]),
        ([], ["rows.jsonl", "empty"]),
    ],
)
def test_bad_rows_are_named(
    lines: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    argv = ["finetune", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--data_files", str(file)]
    said = refusal(capsys, [*argv, "--text_template", TEMPLATE, "--max_steps", "1"])
    assert all(word in said for word in words), said


def test_an_unknown_training_option_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["finetune", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--data_files", str(TRAVEL)]
    said = refusal(capsys, [*argv, "--text_template", TEMPLATE, "--max_stepps", "1"])
    assert "max_stepps" in said
    assert "max_steps" in said


def test_outputs_that_are_not_ours_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(out), *QUICK]
    assert "already holds something else" in refusal(capsys, argv)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert main([*argv, "--overwrite"]) == 0
    assert not (out / "thesis.txt").exists()
    (out / "notes.txt").write_text("added by hand")
    assert "notes.txt was changed or added" in refusal(capsys, argv)


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    argv = ["quantize", "-m", str(LAB_MODEL), *QUICK, "-o"]
    assert "is a file" in refusal(capsys, [*argv, str(file)])
    assert "Not a directory" in refusal(capsys, [*argv, str(file / "below")])
    source = copy(tmp_path)
    for place in (source, source / "below", tmp_path):
        argv = ["quantize", "-m", str(source), "--overwrite", *QUICK, "-o", str(place)]
        assert "must not hold, or lie in, the input" in refusal(capsys, argv)
    assert digests(source) == digests(LAB_MODEL)


def test_an_edited_output_is_not_served_from_the_cache(tmp_path: Path) -> None:
    assert quantize(LAB_MODEL, tmp_path / "one") == 0
    good = digests(tmp_path / "one")
    weights = tmp_path / "one" / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    assert quantize(LAB_MODEL, tmp_path / "two") == 0
    assert digests(tmp_path / "two") == good


def test_processes_that_write_one_output_take_turns(tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "olive", "quantize", "-m", str(LAB_MODEL), "-o", str(out), "--verify", "none"]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    running = [subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(6)]
    assert [process.communicate()[1] for process in running] == [b""] * 6
    assert [process.returncode for process in running] == [0] * 6
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["files"] == digests(out)


def test_a_linked_output_keeps_its_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert quantize(LAB_MODEL, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "real") is not None


def test_nothing_of_the_users_lies_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["quantize", "-m", str(LAB_MODEL), *QUICK, "-o"]
    (tmp_path / "out.report.json").write_text("mine")
    assert "in the way of the report" in refusal(capsys, [*argv, str(tmp_path / "out")])
    assert "would be lost" in refusal(capsys, [*argv, str(Path.home()), "--overwrite"])
    work = tmp_path / "work"
    work.mkdir()
    (work / "book.txt").write_text("a book " * 100)
    data = ["--algorithm", "awq", "--data_files", str(work / "book.txt"), "--overwrite"]
    assert "would be lost" in refusal(capsys, [*argv, str(work), *data])
    assert (work / "book.txt").exists()
    monkeypatch.setenv("OLIVE_CACHE_DIR", "/proc/nowhere")
    assert "set OLIVE_CACHE_DIR" in refusal(capsys, [*argv, str(tmp_path / "other")])
    assert "/proc/out: cannot be written" in refusal(capsys, [*argv, "/proc/out"])


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.quant.formats.shards import ShardWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_finish", full)  # the last write of a file, when its tensors are on disk
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), *QUICK]
    assert "no space left while writing" in refusal(capsys, argv, code=1)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert not list((cache / "entries").glob("*/*"))
    assert not list((cache / "building").glob("*"))


def test_a_disk_that_is_full_outside_of_a_step_is_told_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.cache import Cache
    from olive.cli import run

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), *QUICK]
    for owner, name in ((Cache, "using"), (run, "write_report")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            assert "no space left while writing" in refusal(capsys, argv, code=1)


def test_an_interrupt_keeps_finished_steps_and_nothing_else(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive import verify

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "check_files", interrupt)
    assert "interrupted" in refusal(capsys, ["quantize", *MODEL_AND_OUT[:2], "-o", str(tmp_path / "out")], code=130)
    monkeypatch.undo()
    monkeypatch.setenv("OLIVE_CACHE_DIR", str(cache))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert quantize(LAB_MODEL, tmp_path / "out") == 0
    assert "rtn          cached" in capsys.readouterr().out


def test_an_interrupt_stays_one_if_a_library_makes_an_error_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)  # SIGINT is ignored where tests run in the background
        except KeyboardInterrupt:
            raise ConfigError("transformers cannot load this model: could not import module") from None
        return 0

    monkeypatch.setattr("olive.cli._run", run)
    assert refusal(capsys, ["passes"], 130).startswith("interrupted;")


def test_hub_ids_come_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, commit = tmp_path / "hub", "0" * 40
    repo = hub / "models--microsoft--Phi-3.5-mini-instruct"
    shutil.copytree(LAB_MODEL, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert quantize("microsoft/Phi-3.5-mini-instruct", tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["source"]["model"] == "microsoft/Phi-3.5-mini-instruct"
    assert manifest["source"]["revision"] == commit


def test_set_changes_what_the_file_says_and_plan_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump({"input_model": {"path": str(LAB_MODEL)}, "passes": [{"type": "rtn"}],
                                    "output_dir": str(tmp_path / "out")}))  # fmt: skip
    more = ["--set", "passes.rtn.bits=8", "seed=3", "--set", "passes.0.group_size=64"]
    assert main(["plan", str(file), *more]) == 0
    assert "bits=8, group_size=64" in capsys.readouterr().out
    assert main(["run", str(file), *more, "--verify", "files", "--save_config_file", str(tmp_path / "s.yaml")]) == 0
    saved = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert (saved["seed"], saved["passes"][0]["bits"], saved["passes"][0]["group_size"]) == (3, 8, 64)
    assert "did you mean 'bits'" in refusal(capsys, ["run", str(file), "--set", "passes.rtn.bit=8"])
    assert "give a workflow file: olive plan workflow.yaml" in refusal(capsys, ["plan"])


@pytest.mark.parametrize("words", [["--help"], ["passes"], ["schema"]])
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    ended = subprocess.Popen([sys.executable, "-m", "olive", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.close()
    assert ended.communicate()[1] == b""
    assert ended.returncode == 1


def test_output_is_written_in_letters_that_the_terminal_has(tmp_path: Path) -> None:
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "\N{SNOWMAN}"), *QUICK]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, "-m", "olive", *argv], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert rb"\u2603.report.html" in ended.stdout


def test_a_command_runs_without_standard_error(tmp_path: Path) -> None:
    argv = ["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "q"), *QUICK]
    line = shlex.join([sys.executable, "-m", "olive", *argv]) + " 2>&-"
    assert subprocess.run(line, shell=True, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_file_of_the_users_is_not_taken_for_a_library_by_processes_that_are_started(tmp_path: Path) -> None:
    (tmp_path / "types.py").write_text("raise SystemExit('the users file')")
    argv = [sys.executable, "-P", "-m", "olive", "evaluate", str(LAB_MODEL), "--metrics", "peak_memory"]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_machine_without_a_temporary_folder_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert main(["passes"]) == 2
    assert "set TMPDIR to one that can" in capsys.readouterr().err


def test_a_plan_has_no_line_for_options_of_a_pass_that_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dequantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "out"), "--dry_run"]) == 0
    assert all(line.strip() for line in capsys.readouterr().out.splitlines())


def test_help_tells_a_default_of_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Seed of everything random. Default: 0." in told
    assert "before the update. Default: 0.0." in told
    assert "Run Python code that comes with the model. -t" in told  # a switch is off by default, as all are


def test_passes_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{told}" for name in PASSES)
    assert main(["passes", "lora"]) == 0
    told = capsys.readouterr().out
    assert "  rank (whole number, at least 1; `16` by default)\n      Rank of the updates.\n" in told
    assert "  max_seq_len (whole number, at least 2; `512` by default)" in told
    assert "unknown pass 'lore'; did you mean 'lora'?" in refusal(capsys, ["passes", "lore"])


def test_schema_prints_the_shipped_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(FILE.read_text(encoding="utf-8"))


def test_numbers_in_a_file_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("{overrides: {'*.o_proj': 8:32}, rate: 1e-3, whole: 12, hex: 0x10, zero: 010, text: '1e5'}")
    data = load(file)
    assert data == {
        "overrides": {"*.o_proj": "8:32"},
        "rate": 1e-3,
        "whole": 12,
        "hex": 16,
        "zero": "010",
        "text": "1e5",
    }
    assert yaml.safe_load(dump(data)) == data  # a reader of 1.1 reads the same
    file.write_text(dump(data))
    assert load(file) == data
