"""The recipes: each runs or can be searched, the template fits the target, and auto-opt hands it on with the goals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olive.cli import COMMANDS, main
from olive.cli.auto_opt import goal_template, parser
from olive.cli.options import parse_arguments
from olive.errors import ConfigError
from olive.passes import pass_class
from olive.recipes import SEARCHES, names, recipe, template
from olive.search.space import read_space
from olive.target import Target
from olive.workflow import read_workflow
from places import LAB_MODEL

FIXED = [name for name in names() if "search" not in name]


@pytest.mark.parametrize("name", FIXED)
def test_a_recipe_is_a_workflow_without_model_and_output(name: str) -> None:
    data = recipe(name)
    assert not {"input_model", "output_dir"} & data.keys()
    made = read_workflow(data | {"input_model": {"path": "m"}, "output_dir": "o"})
    assert made.target.device == name.split("-")[0]


def test_every_template_is_used_and_names_options_that_exist() -> None:
    assert set(SEARCHES.values()) == set(names()) - set(FIXED)
    for name in SEARCHES.values():
        data = recipe(name)
        read_space(data | {"input_model": {"path": "m"}, "output_dir": "o"})
        groups = [step if isinstance(step, list) else [step] for step in data["passes"]]
        for step in [step for group in groups for step in group if step is not None]:
            assert step.keys() - {"type"} <= pass_class(step["type"]).model_fields.keys()


@pytest.mark.usefixtures("cache")
def test_a_recipe_runs_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "cpu-int8", "-o", str(tmp_path / "out"), "--verify", "files"]
    assert main(argv) == 2
    assert "cpu-int8: input_model: required, but not given" in capsys.readouterr().err
    assert main([*argv, "--set", f"input_model.path={LAB_MODEL}"]) == 0
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()
    assert main(["run", "cpu-int9"]) == 2
    assert "cpu-int9: no such file, and no recipe is called so; did you mean 'cpu-int8'?" in capsys.readouterr().err


def arguments(*more: str) -> Any:
    assert COMMANDS["auto-opt"]
    own = parser("olive auto-opt")
    return parse_arguments(own, ["-m", str(LAB_MODEL), "-o", "out", *more])


def test_goals_turn_the_target_s_recipe_into_a_template() -> None:
    goals = ["kl_divergence<=0.05", "tokens_per_second>=20"]
    data = goal_template(arguments("--goal", goals[0], "--goal", goals[1], "--trials", "7"))
    expected = recipe("cpu-search")
    assert data["goals"] == goals
    assert data["search"] == expected["search"] | {"trials": 7}
    assert data["passes"] == expected["passes"]
    assert (data["input_model"], data["output_dir"]) == ({"path": str(LAB_MODEL)}, "out")
    gpu = goal_template(arguments("--goal", goals[0], "--device", "gpu"))
    assert gpu["passes"] == recipe("gpu-search")["passes"]
    assert gpu["target"] == {"device": "gpu"}


@pytest.mark.usefixtures("cache")
def test_auto_opt_hands_the_template_to_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["auto-opt", "-m", str(LAB_MODEL), "-o", "out", "--goal", "kl_divergence<=0.05", "--precision", "int4"]
    assert main([*argv, "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "passes.0: kquant, awq, gptq" in told and "passes.1.lm_head: int8, int4" in told
    assert "passes.0.awq.bits" not in told
    assert main([*argv, "--goal", "kl_divergense<=0.05", "--dry_run"]) == 2
    assert "did you mean 'kl_divergence'" in capsys.readouterr().err


def test_options_that_are_given_are_no_holes_any_more() -> None:
    data = goal_template(arguments("--goal", "size_on_disk minimal", "--precision", "int8", "--lm_head", "int4"))
    assert [step["bits"] for step in data["passes"][0]] == [8, 8, 8]
    assert data["passes"][-1]["lm_head"] == "int4"
    assert "precision" not in data["passes"][-1]
    whole = template(Target(), fixed=False, options={"precision": "fp32"})
    assert [step["type"] for step in whole["passes"]] == ["decoder"]
    assert whole["passes"][0]["precision"] == "fp32"
    gpu = template(Target(device="gpu"), fixed=False, options={"precision": "int4"})
    assert None not in gpu["passes"][0]


@pytest.mark.usefixtures("cache")
def test_a_checkpoint_that_is_quantized_or_adapted_stays_as_it_is(tmp_path: Path) -> None:
    assert main(["quantize", "-m", str(LAB_MODEL), "-o", str(tmp_path / "q"), "--verify", "none"]) == 0
    for more in (["-m", str(tmp_path / "q")], ["--adapter_path", str(tmp_path)]):
        data = goal_template(arguments("--goal", "size_on_disk minimal", *more))
        assert [step["type"] for step in data["passes"]] == ["decoder"]


def test_trials_need_a_goal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["auto-opt", "-m", str(LAB_MODEL), "-o", "out", "--trials", "3"]) == 2
    assert "--trials: give what to search for too, as in --goal 'kl_divergence<=0.05'" in capsys.readouterr().err


def test_an_onnx_model_is_no_start_for_a_search(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="is an ONNX model; give the checkpoint that it was made from"):
        goal_template(arguments("--goal", "size_on_disk minimal", "-m", str(tmp_path)))
