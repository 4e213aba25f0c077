"""``olive evaluate``: the table, the JSON, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pairs import Pair

from olive.cli import main
from olive.cli.comparison import show

SHORT = ["--max_seq_len", "64", "--max_samples", "3", "--compute_device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """Return what a command prints: its results, or its error."""
    assert main(["evaluate", *argv]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_table_stands_side_by_side(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "size_on_disk,tokens_per_second,kl_divergence,perplexity"
    said = run(capsys, str(pair.onnx.path), "--against", str(pair.hf.path), "--metrics", asked, "--rounds", "2",
               "--new_tokens", "4", "--prompt_tokens", "8", *SHORT)  # fmt: skip
    lines = said.splitlines()
    assert lines[0].split() == ["metric", str(pair.onnx.path), str(pair.hf.path), "change"]
    assert [line.split()[0] for line in lines[1:]] == asked.split(",")
    size, speed, divergence, perplexity = lines[1:]
    assert " MB " in size and ("worse" in size or "better" in size)
    assert "tokens/s (" in speed and speed.split()[-2:] == ["-", "-"]  # of a checkpoint it is not measured
    assert divergence.split()[-2:] == ["-", "-"]
    assert perplexity.split()[-1] == "same"  # a float graph and its checkpoint
    starts = {line.index(str(pair.hf.path)) if i == 0 else None for i, line in enumerate(lines)} - {None}
    assert len(starts) == 1 and all(line[min(starts) - 1] == " " for line in lines)


def test_a_terminal_gets_the_same_table_with_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["metric", "models/[bold]x"], ["perplexity", "3.5"]]
    show(rows)
    assert capsys.readouterr().out.splitlines() == ["metric      models/[bold]x", "perplexity  3.5"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(rows)
    shown = capsys.readouterr().out
    assert "│ perplexity │ 3.5" in shown
    assert "models/[bold]x" in shown


def test_json_has_the_numbers_and_what_is_around_them(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "-m", str(pair.onnx.path), "--against", str(pair.hf.path), "--json", *SHORT))
    assert [row["name"] for row in found["metrics"]] == [
        "perplexity",
        "kl_divergence",
        "top1_agreement",
        "size_on_disk",
    ]
    row = found["metrics"][0]
    assert (row["unit"], row["direction"]) == ("", "minimize")
    assert row["value"] == pytest.approx(row["against"], rel=1e-5)
    assert "against" in found["metrics"][1] and found["metrics"][1]["against"] is None
    assert found["model"]["facts"]["quality"]["windows"] == 3
    assert found["against"]["path"] == str(pair.hf.path)


def test_without_wishes_it_is_perplexity_and_size(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, str(pair.hf.path), *SHORT)
    assert [line.split()[0] for line in said.splitlines()] == ["metric", "perplexity", "size_on_disk"]


def test_a_metric_that_is_named_twice_is_told_once(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, str(pair.hf.path), "--metrics", "perplexity,perplexity", *SHORT)
    assert [line.split()[0] for line in said.splitlines()] == ["metric", "perplexity"]


def test_adapters_are_compared_in_their_two_forms(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(pair.onnx.path), "--against", str(pair.hf.path), "--adapter", str(pair.onnx_adapter), "--json",
            "--metrics", "kl_divergence", *SHORT]  # fmt: skip
    apart = json.loads(run(capsys, *argv))["metrics"][0]["value"]
    same = json.loads(run(capsys, *argv, "--against_adapter", str(pair.peft)))["metrics"][0]["value"]
    assert same < 1e-6 < 1e-3 < apart


def test_a_function_is_measured_too(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def graphs(model):\n    return len(list(model.path.glob('*.onnx')))\n")
    argv = [str(pair.onnx.path), "--function", f"{tmp_path / 'own.py'}:graphs"]
    assert run(capsys, *argv, "--direction", "maximize").splitlines()[1].split() == ["graphs", "1"]
    assert "give FILE.py:NAME, and --direction minimize or maximize" in run(capsys, *argv, code=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics", "perplexty"], "--metrics perplexty: no such metric; did you mean 'perplexity'?"),
        (["--metrics", "kl_divergence"], "--metrics kl_divergence: compare with another model; give --against"),
        (["--metrics", "tokens_per_second"], "speed measures onnx models, and this is one of kind hf"),
        (["--metrics", "exact_match"], "accuracy needs labelled rows; give data"),
        (["--metrics", "accuracy,exact_match"], "accuracy is for classifiers and exact_match for what generates"),
        (["--adapter", "nothing"], "adapter nothing: neither one of"),
        (["--against_adapter", "x"], "--against_adapter: is for the model that --against names"),
        (["--against", "no/such/folder"], "no/such/folder: no such model folder"),
        (["--metrics", "latency_p50", "--dims", "batch"], "--dims batch: give PATTERN=VALUE"),
        (["--limit", "5"], "--limit: nothing that is measured (quality, size) takes it; drop it"),
        (
            ["--metrics", "size_on_disk", "--max_samples", "5"],
            "--max_samples: nothing that is measured (size) takes it",
        ),
        (["--limit", "0", "--tasks", "x"], "lm_eval: limit: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(more: list[str], message: str, pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run(capsys, str(pair.hf.path), *more, code=2)


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a model: olive evaluate FOLDER" in run(capsys, code=2)
