"""Templates: which holes they have, which points, what fills them, and how their mistakes are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from olive.errors import ConfigError
from olive.search.space import fill, is_template, read_space
from olive.workflow import as_yaml, read_workflow


def template(*passes: Any, **more: Any) -> dict[str, Any]:
    head = {"input_model": {"path": "m"}, "output_dir": "out", "goals": ["size_on_disk minimal"]}
    return head | {"passes": list(passes)} | more


ALTERNATIVES = template(
    [
        {"type": "rtn", "bits": {"choice": [4, 8]}, "group_size": {"choice": [32, 64, 128]}},
        {"type": "hqq", "bits": {"choice": [4, 8]}},
        {"type": "hqq", "symmetric": True},
        None,
    ],
    {"type": "decoder", "accuracy_level": {"choice": [0, 4]}},
)


def refusal(*passes: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read_space(template(*passes, **more), "f.yaml")
    return str(error.value)


def test_holes_of_an_alternative_exist_only_where_it_is_chosen() -> None:
    points = list(read_space(ALTERNATIVES).points())
    assert len(points) == read_space(ALTERNATIVES).size() == (2 * 3 + 2 + 1 + 1) * 2
    assert points[0] == {"passes.0": "rtn", "passes.0.rtn.bits": 4, "passes.0.rtn.group_size": 32,
                         "passes.1.accuracy_level": 0}  # fmt: skip
    by_label = {point["passes.0"]: set(point) - {"passes.0", "passes.1.accuracy_level"} for point in points}
    assert by_label == {
        "rtn": {"passes.0.rtn.bits", "passes.0.rtn.group_size"},
        "hqq": {"passes.0.hqq.bits"},
        "hqq-2": set(),
        "none": set(),
    }


def test_every_point_fills_to_an_ordinary_workflow_and_no_two_are_alike() -> None:
    space = read_space(ALTERNATIVES)
    before = copy.deepcopy(ALTERNATIVES)
    filled = [fill(ALTERNATIVES, space, point) for point in space.points()]
    assert before == ALTERNATIVES
    assert not any(is_template(data) for data in filled)
    workflows = [read_workflow(data) for data in filled]
    assert len({as_yaml(workflow) for workflow in workflows}) == len(filled)
    assert [len(workflow.passes) for workflow in workflows][-2:] == [1, 1]  # none: the first pass is left out


def test_holes_may_lie_deep_and_hold_any_value() -> None:
    data = template(
        {
            "type": {"choice": ["awq", "gptq"]},
            "exclude": {"choice": [[], ["*.down_proj"]]},
            "overrides": {"*.o_proj": {"choice": ["8", "4:32"]}},
            "data": {"name": "text", "max_samples": {"range": [16, 64], "step": 16}},
        },
    )  # fmt: skip
    space = read_space(data)
    assert space.size() == 2 * 2 * 2 * 4
    point = list(space.points())[-1]
    assert point == {
        "passes.0.type": "gptq",
        "passes.0.exclude": ["*.down_proj"],
        "passes.0.overrides.*.o_proj": "4:32",
        "passes.0.data.max_samples": 64,
    }
    assert fill(data, space, point)["passes"] == [
        {"type": "gptq", "exclude": ["*.down_proj"], "overrides": {"*.o_proj": "4:32"},
         "data": {"name": "text", "max_samples": 64}}
    ]  # fmt: skip


def test_a_data_set_may_be_chosen_by_name() -> None:
    sets = {"a": {"name": "text"}, "b": {"name": "text", "max_samples": 4}}
    assert read_space(template({"type": "awq", "data": {"choice": ["a", "b"]}}, data=sets)).size() == 2
    told = refusal({"type": "awq", "data": {"choice": ["a", "c"]}}, data=sets)
    assert told.startswith("f.yaml: passes.0.data: no data set is called 'c'")


def test_ranges() -> None:
    training = {"learning_rate": {"range": [1e-5, 1e-3], "log": True}}
    endless = read_space(template({"type": "lora", "training": training}))
    assert endless.size() is None
    stepped = read_space(template({"type": "lora", "training": {"learning_rate": {"range": [0.0, 0.25], "step": 0.1}}}))
    assert [point["passes.0.training.learning_rate"] for point in stepped.points()] == pytest.approx([0.0, 0.1, 0.2])
    whole = read_space(template({"type": "lora", "rank": {"range": [4, 7]}}))
    assert [point["passes.0.rank"] for point in whole.points()] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"type": "rtn", "bits": {"choice": []}}, "passes.0.bits: choice: expected a list of values, got []"),
        ({"type": "rtn", "bits": {"choice": 4}}, "passes.0.bits: choice: expected a list of values, got 4"),
        ({"type": "rtn", "bits": {"choice": [4, 4]}}, "passes.0.bits: choice: a value is given twice, in [4, 4]"),
        ({"type": "rtn", "bits": {"choice": [4, {"choice": [8]}]}},
         "passes.0.bits: choice: a value may not hold holes; list alternatives of the pass"),
        ({"type": "rtn", "bits": {"choice": [4], "log": True}},
         "passes.0.bits: unknown word 'log' in a hole; allowed: choice"),
        ({"type": "rtn", "group_size": {"range": [64, 32]}},
         "passes.0.group_size: range: expected [low, high] with low below high, got [64, 32]"),
        ({"type": "rtn", "group_size": {"range": [32]}},
         "passes.0.group_size: range: expected [low, high] with low below high, got [32]"),
        ({"type": "rtn", "group_size": {"range": [0, 32], "log": True}},
         "passes.0.group_size: log: true or false; true only for a range above 0 and without a step"),
        ({"type": "rtn", "group_size": {"range": [16, 32], "step": 99}},
         "passes.0.group_size: step: expected a number from above 0 to the range's width, got 99"),
        ({"type": "rtn", "bits": {"choice": [4, 5, 8]}}, "passes.0.bits: input should be 2, 3, 4 or 8, got 5"),
        ({"type": "rtn", "group_size": {"range": [-5, 32]}},
         "passes.0.group_size: input should be greater than or equal to -1, got -5"),
        ({"type": "rtn", "bit": {"choice": [4, 8]}}, "passes.0.bit: unknown option; did you mean 'bits'?"),
        ({"type": "rtn", "bits": {"choice": [4, 8]}, "grup_size": 32},
         "passes.0.grup_size: unknown option; did you mean 'group_size'?"),
        ({"type": {"choice": ["rtn", "rtm"]}}, "passes.0: unknown pass 'rtm'; did you mean 'rtn'?"),
        ([{"type": "rtn"}], "passes.0: expected at least two alternatives, got [{'type': 'rtn'}]"),
        ([{"type": "rtn"}, {"type": "awq", "bits": {"choice": [4, 9]}}],
         "passes.0.awq.bits: input should be 2, 3, 4 or 8, got 9"),
        ([{"type": "rtn"}, {"bits": 4}], "passes.0.None: expected a mapping with a type, got {'bits': 4}"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(step: Any, told: str) -> None:
    assert refusal(step, {"type": "decoder", "accuracy_level": {"choice": [0, 4]}}) == f"f.yaml: {told}"


def test_values_that_only_do_not_fit_together_are_left_to_the_search() -> None:
    # awq's layout holds 4 bits only
    space = read_space(template({"type": "rtn", "bits": {"choice": [8, 4]}, "format": {"choice": ["awq", "gptq"]}}))
    assert space.size() == 4


def test_mistakes_elsewhere_in_the_file_are_told_too() -> None:
    hole = {"type": "rtn", "bits": {"choice": [4, 8]}}
    assert refusal(hole, seed="x").startswith("f.yaml: seed: ")
    assert refusal(hole, goals=["speed <= 3"]).startswith("f.yaml: goals.0: no evaluator measures 'speed'")
    assert refusal(hole, search={"trails": 3}) == "f.yaml: search.trails: unknown option; did you mean 'trials'?"
    assert refusal(hole, search={"workers": 0}).startswith("f.yaml: search.workers: give a number of processes from 1")
    told = refusal(hole, target={"device": {"choice": ["cpu"]}})
    assert told.startswith("f.yaml: target.device: input should be 'cpu' or 'gpu'")
    data = {"a": {"name": "text", "max_samples": {"choice": [1, 2]}}}
    assert "f.yaml: data.a.max_samples" in refusal(hole, data=data)


def test_a_template_with_one_point_is_refused() -> None:
    assert refusal({"type": "rtn", "bits": {"choice": [4]}}).endswith(
        "every hole has one value only, so there is nothing to search"
    )


def test_an_ordinary_workflow_is_no_template() -> None:
    assert not is_template(template({"type": "rtn", "bits": 4, "overrides": {"*.o_proj": "8"}}))
    assert not is_template({"passes": None})
    with pytest.raises(ConfigError, match=r"w: passes.0: alternatives, which only olive run can search over"):
        read_workflow(template([{"type": "rtn"}, {"type": "hqq"}]), "w")


def test_a_stage_leaves_one_pass_open() -> None:
    space = read_space(ALTERNATIVES)
    assert space.stages() == [0, 1]
    first = space.stage(0, {})
    assert first.size() == 10
    assert {point["passes.1.accuracy_level"] for point in first.points()} == {0}
    second = space.stage(1, {"passes.0": "hqq", "passes.0.hqq.bits": 8})
    assert list(second.points()) == [
        {"passes.0": "hqq", "passes.0.hqq.bits": 8, "passes.1.accuracy_level": level} for level in (0, 4)
    ]
