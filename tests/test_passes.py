"""Contracts that every registered pass keeps; a new pass is tested by being registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from olive.cache import Cache
from olive.config import parse
from olive.engine import run
from olive.errors import ConfigError
from olive.model import digests
from olive.passes import PASSES, pass_class, pass_name
from olive.passes.base import Pass
from olive.plan import key_parts, plan, step_digest
from olive.workflow import Workflow, as_data, read_workflow
from places import LAB_MODEL, TEMPLATE, TRAVEL

ROWS = {"name": "json", "files": [str(TRAVEL)], "text_template": TEMPLATE, "max_samples": 8, "max_seq_len": 48}
OPTIONS: dict[str, dict] = {
    "awq": {"data": ROWS, "group_size": 64},
    "gptq": {"data": ROWS, "group_size": 64, "bits": 8},
    "tune": {"data": ROWS, "group_size": 64, "iterations": 2},
    "distill": {"data": ROWS, "group_size": 64, "iterations": 2, "steps": 2, "own_rows": 8},
    "smooth": {"data": ROWS},
    "best": {"data": ROWS, "group_size": 64, "candidates": [{"type": "rtn"}, {"type": "awq"}]},
    "lora": {"data": ROWS, "rank": 2, "training": {"max_steps": 1, "per_device_train_batch_size": 2}},
}
"""Options that make a pass quick on the lab's model; the others run with their defaults."""


def workflow(name: str, tmp_path: Path) -> Workflow:
    before = [{"type": "rtn"}] if name == "dequantize" else []
    steps = [*before, {"type": name, **OPTIONS.get(name, {})}]
    return read_workflow({"input_model": {"path": str(LAB_MODEL)}, "passes": steps, "output_dir": str(tmp_path / "out"),
                          "verify": {"level": "files"}})  # fmt: skip


@pytest.fixture(params=PASSES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_registered_under_its_file_and_class(name: str) -> None:
    module, _, kind = PASSES[name].partition(":")
    assert module == f"olive.passes.{name}"
    assert kind.lower() == name
    assert pass_name(pass_class(name)()) == name


def test_every_option_has_help(name: str) -> None:
    kind = pass_class(name)
    assert kind.__doc__ and kind.__doc__ != Pass.__doc__
    assert [field for field, info in kind.model_fields.items() if not info.description] == []


def test_an_unknown_option_is_refused_with_the_options(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        parse(pass_class(name), {"no_such_option": 1}, name)


def test_reads_back_from_what_it_prints(name: str, tmp_path: Path) -> None:
    before = workflow(name, tmp_path)
    assert read_workflow(as_data(before)) == before


def test_its_own_code_is_part_of_its_key(name: str) -> None:
    assert f"olive.passes.{name}" in pass_class(name).sources


def test_keys_are_the_same_in_another_process(name: str, tmp_path: Path) -> None:
    made = workflow(name, tmp_path)
    here = step_digest(key_parts(made.passes[-1], "input", made, "cpu"))
    code = (
        "import json, sys\nfrom olive.plan import key_parts, step_digest\nfrom olive.workflow import read_workflow\n"
        "made = read_workflow(json.loads(sys.argv[1]))\n"
        "print(step_digest(key_parts(made.passes[-1], 'input', made, 'cpu')))"
    )
    import json
    import os

    argv = [sys.executable, "-c", code, json.dumps(as_data(made))]
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    there = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
    assert there.stdout.strip() == here


def test_an_option_changes_the_key(tmp_path: Path) -> None:
    made = workflow("rtn", tmp_path)
    step = made.passes[-1]
    other = step.model_copy(update={"group_size": 64})
    assert key_parts(step, "input", made, "cpu") != key_parts(other, "input", made, "cpu")
    assert step_digest(key_parts(step, "input", made, "cpu")) != step_digest(
        key_parts(step, "another input", made, "cpu")
    )


def test_the_contents_of_data_change_the_key(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    keys = set()
    for text in ("one text", "another text"):
        file.write_text(text)
        made = read_workflow({"input_model": {"path": str(LAB_MODEL)}, "output_dir": "out",
                              "passes": [{"type": "awq", "data": {"files": [str(file)]}}]})  # fmt: skip
        keys.add(step_digest(key_parts(made.passes[0], "input", made, "cpu")))
    assert len(keys) == 2


def test_runs_leaves_its_input_alone_and_is_cached(name: str, tmp_path: Path) -> None:
    before = digests(LAB_MODEL)
    cache = Cache(tmp_path / "cache")
    made = workflow(name, tmp_path)
    first = run(plan(made, cache), cache)
    written = digests(tmp_path / "out")
    assert digests(LAB_MODEL) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    assert not any((tmp_path / "cache" / "scratch").glob("*"))
    second = run(plan(made, cache), cache)
    assert [step.cached for step in (*first.steps, *second.steps)] == [False] * len(first.steps) + [True] * len(
        first.steps
    )
    assert digests(tmp_path / "out") == written
    fresh = Cache(tmp_path / "fresh")
    run(plan(made, fresh), fresh)
    assert digests(tmp_path / "out") == written  # the same key gives the same bytes
