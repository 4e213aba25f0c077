"""--set: assignments reach what their path names, and a wrong path is told with its place and the nearest names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from olive.assign import assign
from olive.errors import ConfigError

WORKFLOW: dict[str, Any] = {
    "input_model": {"path": "m"},
    "data": {"books": {"name": "text"}},
    "passes": [
        {"type": "awq", "data": "books"},
        [{"type": "rtn"}, {"type": "gptq", "bits": {"choice": [4, 8]}}],
        {"type": "lora"},
        {"type": "best", "candidates": [{"type": "rtn"}]},
    ],
    "output_dir": "o",
}


def leaves(data: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if inner is None:
        yield path, data
    for name, value in inner or ():
        yield from leaves(value, (*path, name))


@pytest.mark.parametrize(
    ("text", "place", "value"),
    [
        ("seed=4", ["seed"], 4),
        ("output_dir=12", ["output_dir"], 12),
        ("target.device=gpu", ["target", "device"], "gpu"),
        ("verify.max_kl=1e-3", ["verify", "max_kl"], 1e-3),
        ("data.books.max_samples=3", ["data", "books", "max_samples"], 3),
        ("passes.awq.bits=8", ["passes", 0, "bits"], 8),
        ("passes.0.exclude=[a, b]", ["passes", 0, "exclude"], ["a", "b"]),
        ("passes.gptq.bits={choice: [2, 3]}", ["passes", 1, 1, "bits"], {"choice": [2, 3]}),
        ("passes.1.0.bits=2", ["passes", 1, 0, "bits"], 2),
        ("passes.1.rtn.bits=2", ["passes", 1, 0, "bits"], 2),
        ("passes.awq.overrides.*.down_proj=8:32", ["passes", 0, "overrides", "*.down_proj"], "8:32"),
        ("passes.lora.training.max_steps=3", ["passes", 2, "training", "max_steps"], 3),
        ("passes.lora.data.max_samples=2", ["passes", 2, "data", "max_samples"], 2),
        ("passes.best.candidates.0.bits=3", ["passes", 3, "candidates", 0, "bits"], 3),
        ("passes.awq.data=null", ["passes", 0, "data"], None),
    ],
)
def test_an_assignment_reaches_what_it_names_and_nothing_else(text: str, place: list, value: Any) -> None:
    before = repr(WORKFLOW)
    made = assign(WORKFLOW, [text])
    assert repr(WORKFLOW) == before
    found = made
    for part in place[:-1]:
        found = found[part]
    assert found[place[-1]] == value
    assert type(found[place[-1]]) is type(value)
    one, other = dict(leaves(WORKFLOW)), dict(leaves(made))
    changed = {path for path in one.keys() | other.keys() if one.get(path, ...) != other.get(path, ...)}
    assert all(path[: len(place)] == tuple(place) for path in changed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits", "--set bits: give PATH=VALUE, as in passes.awq.bits=8"),
        ("sed=1", "--set sed: unknown name 'sed'; did you mean 'seed'?"),
        ("target.devic=gpu", "--set target.devic: unknown name 'devic'; did you mean 'device'?"),
        ("data.book.name=x", "--set data.book.name: unknown name 'book'; did you mean 'books'?"),
        ("passes.awq.bit=1", "--set passes.awq.bit: unknown name 'bit'; did you mean 'bits'?"),
        ("passes.aqw.bits=1", "no pass of this workflow has type 'aqw'; did you mean 'awq'?"),
        ("passes.hqq.bits=1", "no pass of this workflow has type 'hqq'; allowed: awq, best, gptq, lora, rtn"),
        ("passes.9.bits=1", "--set passes.9.bits: there is no item 9; the last is 3"),
        ("passes.1.bits=1", "no pass of this workflow has type 'bits'"),
        ("passes.1=1", "passes.1 is a list of alternatives; name one of them"),
        ("passes.awq=1", "name an option of the pass too, as in passes.awq.bits"),
        ("passes.awq.bits.x=1", "8 is there, which has no option 'x'"),
        ("passes.awq.data.max_samples=1", "is the name 'books' there; set data.books.max_samples instead"),
        ("passes.awq.bits=[", "--set passes.awq.bits=[: the value is not YAML"),
        ("passes.best.candidates.x=1", "a list is there; give an index from 0"),
    ],
)
def test_a_wrong_path_is_told_with_its_place_and_the_nearest_names(text: str, words: str) -> None:
    data = assign(WORKFLOW, ["passes.awq.bits=8"])
    with pytest.raises(ConfigError) as caught:
        assign(data, [text])
    assert words in str(caught.value)


def test_a_type_that_stands_twice_needs_the_index() -> None:
    data = {"passes": [{"type": "rtn"}, {"type": "rtn"}]}
    with pytest.raises(ConfigError, match=r"2 passes have type 'rtn'; give the index: passes\.0, passes\.1"):
        assign(data, ["passes.rtn.bits=4"])
    assert assign(data, ["passes.1.bits=4"])["passes"] == [{"type": "rtn"}, {"type": "rtn", "bits": 4}]
