"""The JSON schema of a workflow file: for editors that complete and check while one writes.

Every pass has its options by its ``type``. Any option may be a hole, at any depth, and a list of alternatives may stand
in place of a pass. What only the values together decide (which bits a layout holds, say) is checked when the file is
read.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from olive.config import Config
from olive.data.spec import DataSpec
from olive.evaluate.evaluators import EVALUATORS, evaluator_class
from olive.passes import PASSES, pass_class
from olive.workflow import Workflow

FILE = Path(__file__).with_name("workflow.schema.json")
"""The shipped schema; ``docs/generate.py`` writes it."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
RANGE = {
    "description": "A hole that takes a number between two in a search.",
    "type": "object",
    "properties": {
        "range": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "log": {"type": "boolean", "description": "Spread evenly over magnitudes."},
        "step": {"type": "number", "exclusiveMinimum": 0, "description": "Every so many."},
    },
    "required": ["range"],
    "additionalProperties": False,
}
SAID = ("description", "default")
NO_PASS = {"description": "No pass: the alternative that does nothing.", "type": "null"}


def workflow_schema() -> dict[str, Any]:
    """Return the schema, made from the fields of the workflow and of every pass."""
    known: dict[str, Any] = {"range": RANGE, "DataSpec": _object(DataSpec, {})}
    schema = _object(Workflow, known)
    schema["properties"]["data"] = {
        "description": "Data sets by name, for passes to refer to.",
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/DataSpec"},
    }
    for name in EVALUATORS:
        known[f"evaluator_{name}"] = _with_named_data(evaluator_class(name), name, known)
    known["evaluator"] = _by_type(EVALUATORS, lambda name: {"$ref": f"#/$defs/evaluator_{name}"})
    schema["properties"]["evaluators"]["additionalProperties"] = {"$ref": "#/$defs/evaluator"}
    goal = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Goal"}]}
    schema["properties"]["goals"]["items"] = goal
    for name in PASSES:
        known[f"pass_{name}"] = _pass(name, known)
    del known["Pass"], known["Evaluator"]
    schema["required"].remove("output_dir")  # --output_path gives it as well
    known["pass"] = _by_type(PASSES, lambda name: {"$ref": f"#/$defs/pass_{name}"})
    alternatives = {"type": "array", "minItems": 2, "items": {"anyOf": [{"$ref": "#/$defs/pass"}, NO_PASS]}}
    schema["properties"]["passes"] |= {
        "type": "array",
        "minItems": 1,
        "items": {"if": {"type": "array"}, "then": alternatives, "else": {"$ref": "#/$defs/pass"}},
    }
    return {"$schema": DIALECT, "title": "Olive workflow", **schema, "$defs": known}


def text() -> str:
    """Return the schema as the file that is shipped."""
    return json.dumps(workflow_schema(), indent=1, ensure_ascii=False) + "\n"


def _by_type(names: Iterable[str], schema: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Choose by ``type``; so a mistake is reported for the type that was given, not for all of them."""
    chosen = [
        {"if": {"required": ["type"], "properties": {"type": {"const": name}}}, "then": schema(name)} for name in names
    ]
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(names), "description": "Which one."}},
        "allOf": chosen,
    }


def _pass(name: str, known: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    schema = _with_named_data(pass_class(name), name, inner)
    for part, own in inner.items():  # here too an option may be a hole, other than in the rest of the file
        known[f"{part}_of_pass"] = own | {"properties": _with_holes(own["properties"], inner)}
    options = {option: own for option, own in schema["properties"].items() if option != "type"}
    return schema | {"properties": {"type": {"const": name}, **_with_holes(options, inner)}}


def _with_named_data(kind: type[Config], name: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a pass or an evaluator, whose data may be the name of a data set."""
    schema = _object(kind, known)
    options = schema.setdefault("properties", {})
    if "data" in options:
        named = {"type": "string", "description": "Name of a data set."}
        options["data"] = {key: options["data"][key] for key in SAID if key in options["data"]} | {
            "anyOf": [named, *_branches(options["data"])]
        }
    return schema | {"properties": {"type": {"const": name}, **options}}


def _object(kind: type[Config], known: dict[str, Any]) -> dict[str, Any]:
    """Return a class's schema; the schemas of classes that it holds go to ``known``."""
    schema = kind.model_json_schema()
    known |= {name: _tidy(inner) for name, inner in schema.pop("$defs", {}).items()}
    return _tidy(schema | {"description": inspect.cleandoc(kind.__doc__ or "")})


def _tidy(schema: Any) -> Any:
    """Drop the titles that pydantic derives from names, and put descriptions on one line."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "description" and isinstance(value, str):
            found[key] = re.sub(r"\s+", " ", value).strip()
        elif key in ("properties", "$defs"):
            found[key] = {name: _tidy(inner) for name, inner in value.items()}
        elif key in ("default", "const", "enum"):
            found[key] = value
        else:
            found[key] = _tidy(value)
    return found


def _branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the kinds of value that an option takes."""
    return schema.get("anyOf") or [{key: value for key, value in schema.items() if key not in SAID}]


def _with_holes(options: dict[str, Any], inner: Iterable[str]) -> dict[str, Any]:
    """Let options be holes too; the values of a choice are those of the option."""
    found: dict[str, Any] = {}
    for name, schema in options.items():
        said = {key: schema[key] for key in SAID if key in schema}
        branches = _branches(schema)
        for branch in branches:
            if branch.get("$ref", "").rpartition("/")[2] in inner:
                branch["$ref"] += "_of_pass"
        values = {"type": "array", "minItems": 1, "items": {"anyOf": branches} if len(branches) > 1 else branches[0]}
        choice = {
            "type": "object",
            "properties": {"choice": values},
            "required": ["choice"],
            "additionalProperties": False,
        }
        numbers = any(branch.get("type") in ("integer", "number") for branch in branches)
        found[name] = said | {"anyOf": [*branches, choice, *([{"$ref": "#/$defs/range"}] if numbers else [])]}
    return found
