"""olive init: from answers to a workflow file, and to the command that stands for the same."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from olive.cli import main
from olive.config import load
from olive.workflow import read_workflow
from places import LAB_MODEL, TRAVEL


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(monkeypatch: pytest.MonkeyPatch, *answers: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in answers)))
    return main(["init"])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("answers", "command"),
    [
        (["", str(LAB_MODEL), "", "", "out", ""],
         f"olive quantize -m {LAB_MODEL} --algorithm rtn --precision int4 --output_path out"),
        (["1", str(LAB_MODEL), "gptq", "2", str(TRAVEL), "", "out", ""],
         f"olive quantize -m {LAB_MODEL} --algorithm gptq --precision int8 --data_name json --data_files {TRAVEL} "
         r"--text_template '{prompt}\n{response}' --output_path out"),
        (["1", str(LAB_MODEL), "awq", "int8", "", "out", ""],
         f"olive quantize -m {LAB_MODEL} --algorithm awq --precision int8 --format gptq --output_path out"),
        (["onnx", str(LAB_MODEL), "cpu", "int8", "", "out", ""],
         f"olive auto-opt -m {LAB_MODEL} --device cpu --precision int8 --output_path out"),
        (["adapter", str(LAB_MODEL), str(TRAVEL), "", "5", "out", ""],
         f"olive finetune -m {LAB_MODEL} --data_name json --data_files {TRAVEL} --text_template '{{prompt}}"
         r"\n{response}' --max_steps 5 --output_path out"),
    ],
)  # fmt: skip
def test_the_file_is_what_the_command_stands_for(
    answers: list[str], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(monkeypatch, *answers) == 0
    told = capsys.readouterr().out
    assert told == f"\n{command}\n\ndoes the same as\n\nolive run out.yaml\n"
    made = load(Path("out.yaml"))
    read_workflow(made)
    _, *argv = shlex.split(command)
    assert main([*argv, "--save_config_file", "again.yaml", "--dry_run"]) == 0
    assert load(Path("again.yaml")) == made
    assert not Path("out").exists()


def test_goals_give_a_template(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    goals = ["kl_divergence<=0.1", "size_on_disk minimal"]
    assert answer(monkeypatch, "goals", str(LAB_MODEL), "", *goals, "", "9", "out", "file.yaml") == 0
    assert "--goal 'kl_divergence<=0.1' --goal 'size_on_disk minimal' --trials 9" in capsys.readouterr().out
    made = load(Path("file.yaml"))
    assert made["goals"] == goals
    assert made["search"]["trials"] == 9


def test_a_goal_that_nothing_measures_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(monkeypatch, "goals", str(LAB_MODEL), "", "speediness<=1", "", "9", "out", "file.yaml") == 2
    assert "no evaluator measures 'speediness'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_answers_are_asked_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["7", "nothing", "adapter", "", str(LAB_MODEL), str(TRAVEL), "", "many", "3", "out", ""]
    assert answer(monkeypatch, *answers) == 0
    said = capsys.readouterr()
    assert all(words in said.err for words in ("'7' is none of them", "'nothing' is none", "'many' is not a whole"))
    assert "--max_steps 3" in said.out


def test_answers_that_end_early_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(monkeypatch, "onnx", str(LAB_MODEL)) == 2
    assert "the answers ended at: Number or name?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_contents_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.yaml").write_text("mine")
    assert answer(monkeypatch, "", str(LAB_MODEL), "", "", "out", "") == 2
    assert "exists with other contents" in capsys.readouterr().err
    assert Path("out.yaml").read_text() == "mine"
