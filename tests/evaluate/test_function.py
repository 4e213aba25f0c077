"""A user's function as an evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest

from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Measuring, measured
from olive.evaluate.function import Function
from olive.model import Model

CODE = """
from __future__ import annotations

from dataclasses import dataclass

@dataclass
class Held:
    value: float

def files(model):
    return len(list(model.path.iterdir()))

def fails(model):
    raise KeyError("there")

def words(model):
    return "many"

def nothing(model):
    return float("nan")
"""


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("")
    (tmp_path / "score.py").write_text(CODE)
    return Model("hf", tmp_path / "model")


def function(model: Model, name: str, file: str = "score.py") -> Function:
    return Function(file=str(model.path.parent / file), function=name, direction="maximize", unit="files")


def test_it_gives_its_metric_with_the_direction_that_was_said(model: Model) -> None:
    asked = function(model, "files")
    assert measured(asked, model, Measuring()) == {"files": 1.0}
    metric = asked.metrics()["files"]
    assert (metric.direction, metric.unit, metric.help) == ("maximize", "files", "files of score.py")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fails", OliveError, r"score\.py: fails failed on .*model: KeyError: 'there'"),
        ("words", OliveError, "words must return a number, got 'many'"),
        ("nothing", OliveError, "nothing is nan, which is no measurement"),
        ("absent", ConfigError, "has no function absent; it has: dataclass, Held, files, fails, words, nothing"),
    ],
)
def test_mistakes_in_it_are_told(name: str, error: type[Exception], message: str, model: Model) -> None:
    with pytest.raises(error, match=message):
        measured(function(model, name), model, Measuring())


def test_files_that_are_no_code_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"none\.py: no such Python file"):
        measured(function(model, "f", "none.py"), model, Measuring())
    (model.path.parent / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"broken\.py: cannot be imported: ModuleNotFoundError: No module named"):
        measured(function(model, "f", "broken.py"), model, Measuring())
    (model.path.parent / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"notes\.txt: not a Python file; its name must end in \.py"):
        measured(function(model, "f", "notes.txt"), model, Measuring())
