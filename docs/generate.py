"""Write docs/commands.md, docs/passes.md and docs/evaluators.md from the parsers and the fields of the options.

    python docs/generate.py

tests/test_docs.py fails when the files are not what this script would write.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from olive.cli import COMMANDS
from olive.cli.options import Parser
from olive.config import Config
from olive.data.spec import DataSpec
from olive.evaluate.evaluators import EVALUATORS, Evaluator, evaluator_class
from olive.evaluate.metrics import METRICS
from olive.goals import Goal
from olive.passes import PASSES, pass_class
from olive.passes.base import Pass
from olive.target import Target
from olive.workflow import InputModel, Search, Verification, Workflow

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py; edit the sources, then run it again. -->"


def parser_of(command: str) -> Parser:
    """Return the parser of a command."""
    parser: Parser = importlib.import_module(COMMANDS[command][0]).parser(f"olive {command}")
    return parser


def commands() -> str:
    """Return the text of commands.md."""
    lines = ["# Commands", "", NOTE, "", "Flags may be written with hyphens too: `--output-path` is `--output_path`."]
    seen: dict[str, str] = {}
    for name, (module, _) in COMMANDS.items():
        lines += ["", f"## olive {name}", ""]
        if module in seen:
            lines.append(f"The same command as [olive {seen[module]}](#olive-{seen[module]}).")
            continue
        seen[module] = name
        parser = parser_of(name)
        lines += [_line(parser.description or ""), "", "| Flag | Value | Meaning |", "|---|---|---|"]
        lines += [_row(action) for action in parser._actions if action.dest != "help"]
    return "\n".join(lines) + "\n"


def _row(action: argparse.Action) -> str:
    flags = sorted(action.option_strings, key=len, reverse=True) or [action.metavar or action.dest]
    if action.choices is not None:
        value = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    else:
        value = f"{action.metavar or action.dest.upper()}{' ...' if action.nargs == '+' else ''}"
    text = (action.help or "").replace("%%", "%")
    return f"| {', '.join(f'`{flag}`' for flag in flags)} | {value} | {_cell(text)} |"


def passes() -> str:
    """Return the text of passes.md."""
    lines = ["# Passes and workflow fields", "", NOTE, ""]
    lines += ["What a workflow file may say: the passes by their `type`, then the other parts of the file."]
    for name in PASSES:
        kind = pass_class(name)
        lines += ["", f"## {name}", "", *_paragraphs(kind), ""]
        lines += [f"Accepts: {', '.join(kind.accepts)}. Produces: {kind.produces}.", "", *_fields(kind)]
    for title, kind in (
        ("Data sets", DataSpec),
        ("Workflow", Workflow),
        ("input_model", InputModel),
        ("target", Target),
        ("verify", Verification),
        ("goals", Goal),
        ("search", Search),
    ):
        lines += ["", f"## {title}", "", *_paragraphs(kind), "", *_fields(kind)]
    return "\n".join(lines) + "\n"


def evaluators() -> str:
    """Return the text of evaluators.md."""
    lines = ["# Metrics and evaluators", "", NOTE, "", "How to use them: [evaluate.md](evaluate.md)."]
    lines += ["", "## Metrics", ""]
    lines += ["| Metric | Better | Unit | Meaning | Evaluator |", "|---|---|---|---|---|"]
    givers = {metric: name for name in EVALUATORS for metric in evaluator_class(name).names}
    for name, metric in METRICS.items():
        better = "less" if metric.direction == "minimize" else "more"
        lines.append(f"| `{name}` | {better} | {metric.unit} | {metric.help} | [{givers[name]}](#{givers[name]}) |")
    for name in EVALUATORS:
        kind = evaluator_class(name)
        lines += ["", f"## {name}", "", *_paragraphs(kind), ""]
        lines += [f"Measures: {', '.join(kind.kinds)}.", "", *_fields(kind)]
    return "\n".join(lines) + "\n"


def _paragraphs(kind: type) -> Iterator[str]:
    for i, part in enumerate(inspect.cleandoc(kind.__doc__ or "").split("\n\n")):
        yield from ([""] if i else []) + [_line(part)]


def _fields(kind: type[Config]) -> Iterator[str]:
    if not kind.model_fields:
        yield "No options."
        return
    yield from ("| Field | Type | Default | Meaning |", "|---|---|---|---|")
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        limits = "".join(f", {word} {value}" for word, value in _limits(field.metadata))
        yield f"| `{name}` | {_type(field.annotation)}{limits} | {default} | {_cell(field.description or '')} |"


def _limits(metadata: list[Any]) -> Iterator[tuple[str, Any]]:
    for item in metadata:
        for attribute, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if getattr(item, attribute, None) is not None:
                yield word, getattr(item, attribute)


NAMES: dict[type, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Pass: "pass",
    DataSpec: "[data set](passes.md#data-sets)",
    InputModel: "[input_model](#input_model)",
    Target: "[target](#target)",
    Verification: "[verify](#verify)",
    Goal: "[goal](#goals)",
    Search: "[search](#search)",
    Evaluator: "evaluator",
}


def _type(kind: Any) -> str:
    if kind in NAMES:
        return NAMES[kind]
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if get_origin(kind) is tuple:
        return f"list of {_type(parts[0])}"
    if get_origin(kind) is dict:
        return "options by name"
    # a union, or a type with annotations that are no types
    return " or ".join(_type(part) for part in parts if isinstance(part, type) or get_origin(part))


def _default(value: Any) -> str:
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, Config):
        return "its defaults"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("``", "`")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("*.", "\\*.")


def pages() -> dict[Path, str]:
    """Return every generated file with its text."""
    texts = {"commands.md": commands(), "passes.md": passes(), "evaluators.md": evaluators()}
    return {DOCS / name: text for name, text in texts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.name)
