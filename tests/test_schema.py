"""The shipped JSON schema: current, itself valid, and of the same opinion as the reader of workflow files."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from olive.errors import ConfigError
from olive.evaluate.evaluators import EVALUATORS, evaluator_class
from olive.passes import PASSES, pass_class
from olive.recipes import names, recipe
from olive.schema import FILE, text
from olive.workflow import read_workflow

BASE = {"input_model": {"path": "m"}, "output_dir": "o"}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_shipped_schema_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run: python docs/generate.py"


def test_every_option_of_every_pass_is_in_it_with_its_help(validator: Draft202012Validator) -> None:
    for name in PASSES:
        told = validator.schema["$defs"][f"pass_{name}"]["properties"]
        assert told.keys() - {"type"} == pass_class(name).model_fields.keys()
        assert all(told[option]["description"] for option in pass_class(name).model_fields)


VALID: list[list[Any]] = [
    [{"type": "rtn"}],
    [{"type": "awq", "data": "books", "bits": 4}, {"type": "decoder"}],
    [{"type": "awq", "data": {"name": "text", "max_samples": 8}, "overrides": {"*.down_proj": "4:32"}}],
    [{"type": "lora", "target_modules": ["q_proj"], "training": {"max_steps": 1}, "data": "books"}],
    [{"type": "best", "candidates": [{"type": "rtn"}]}],
]
HOLES: list[list[Any]] = [
    [{"type": "gptq", "bits": {"choice": [4, 8]}, "damping": {"range": [0.001, 0.1], "log": True}}],
    [{"type": "rtn", "group_size": {"range": [32, 128], "step": 32}, "symmetric": {"choice": [True, False]}}],
    [{"type": "awq", "data": {"max_samples": {"choice": [4, 8]}}}],
    [{"type": "awq", "data": {"choice": ["books", {"name": "text"}]}}],
    [[{"type": "rtn", "bits": {"choice": [4, 8]}}, {"type": "awq"}, None], {"type": "decoder"}],
]
INVALID: list[list[Any]] = [
    [],
    [{"bits": 4}],
    [{"type": "nope"}],
    [{"type": "rtn", "bit": 4}],
    [{"type": "rtn", "bits": 5}],
    [{"type": "rtn", "bits": "many"}],
    [{"type": "lora", "rank": 0}],
    [{"type": "awq", "data": {"no_such": 1}}],
]
INVALID_HOLES: list[list[Any]] = [
    [{"type": "gptq", "bits": {"choice": [4, 5]}}],
    [{"type": "gptq", "bits": {"choice": []}}],
    [{"type": "gptq", "bits": {"choice": [4], "log": True}}],
    [{"type": "gptq", "damping": {"range": [1]}}],
    [{"type": "gptq", "symmetric": {"range": [0, 1]}}],
    [[{"type": "rtn"}]],
    [[{"type": "rtn"}, {"type": "nope"}]],
]


@pytest.mark.parametrize("passes", VALID)
def test_it_takes_what_the_reader_takes(validator: Draft202012Validator, passes: list[Any]) -> None:
    data = BASE | {"passes": passes, "data": {"books": {"name": "text"}}}
    read_workflow(data)
    assert [error.message for error in validator.iter_errors(data)] == []


@pytest.mark.parametrize("passes", HOLES)
def test_it_takes_holes_and_alternatives(validator: Draft202012Validator, passes: list[Any]) -> None:
    assert [error.message for error in validator.iter_errors(BASE | {"passes": passes})] == []


@pytest.mark.parametrize("passes", INVALID)
def test_it_refuses_what_the_reader_refuses(validator: Draft202012Validator, passes: list[Any]) -> None:
    data = BASE | {"passes": passes}
    with pytest.raises(ConfigError):
        read_workflow(data)
    assert not validator.is_valid(data)


@pytest.mark.parametrize("passes", INVALID_HOLES)
def test_it_refuses_bad_holes(validator: Draft202012Validator, passes: list[Any]) -> None:
    assert not validator.is_valid(BASE | {"passes": passes})


def test_only_options_of_passes_may_be_holes(validator: Draft202012Validator) -> None:
    books = {"books": {"max_samples": {"choice": [1, 2]}}}
    assert not validator.is_valid(BASE | {"passes": [{"type": "rtn"}], "data": books})
    assert not validator.is_valid(BASE | {"passes": [{"type": "rtn"}], "seed": {"choice": [1, 2]}})


def test_evaluators_goals_and_the_search_are_in_it(validator: Draft202012Validator) -> None:
    base = BASE | {"passes": [{"type": "rtn", "bits": {"choice": [4, 8]}}], "data": {"books": {"name": "text"}}}
    told = {"quality": {"type": "quality", "data": "books"}, "tasks": {"type": "lm_eval", "tasks": ["a"], "limit": 3}}
    goals = ["kl_divergence <= 0.05", {"metric": "size_on_disk", "minimize": True}]
    data = base | {"evaluators": told, "goals": goals, "search": {"sampler": "random", "trials": 3}}
    assert [error.message for error in validator.iter_errors(data)] == []
    for name in EVALUATORS:
        properties = validator.schema["$defs"][f"evaluator_{name}"]["properties"]
        assert properties.keys() - {"type"} == evaluator_class(name).model_fields.keys()
    for wrong in ({"evaluators": {"q": {"type": "qualty"}}}, {"evaluators": {"q": {"type": "quality", "dat": "books"}}},
                  {"goals": [3]}, {"search": {"sampler": "luck"}}):  # fmt: skip
        assert not validator.is_valid(base | wrong)


def test_a_mistake_is_reported_for_the_pass_that_was_meant(validator: Draft202012Validator) -> None:
    (error,) = validator.iter_errors(BASE | {"passes": [{"type": "rtn", "bit": 4}]})
    assert list(error.path) == ["passes", 0]
    assert "'bit' was unexpected" in error.message


@pytest.mark.parametrize("name", names())
def test_recipes_are_valid(validator: Draft202012Validator, name: str) -> None:
    assert [error.message for error in validator.iter_errors(BASE | recipe(name))] == []
