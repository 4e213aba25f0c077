"""Write docs/commands.md, passes.md, evaluators.md and the JSON schema of workflows from the parsers and the options.

    python docs/generate.py

tests/test_docs.py fails when the files are not what this script would write.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from olive import schema
from olive.cli import COMMANDS
from olive.cli.describe import WORDS, default_of, limits, one_line, type_of
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
        lines += [one_line(parser.description or ""), "", "| Flag | Value | Meaning |", "|---|---|---|"]
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
        yield from ([""] if i else []) + [one_line(part)]


def _fields(kind: type[Config]) -> Iterator[str]:
    if not kind.model_fields:
        yield "No options."
        return
    yield from ("| Field | Type | Default | Meaning |", "|---|---|---|---|")
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        words = "required" if field.is_required() else default_of(default).removesuffix(" by default")
        kinds = type_of(field.annotation, NAMES) + limits(field.metadata)
        yield f"| `{name}` | {kinds} | {words} | {_cell(field.description or '')} |"


NAMES: dict[type, str] = WORDS | {
    Pass: "pass",
    DataSpec: "[data set](passes.md#data-sets)",
    InputModel: "[input_model](#input_model)",
    Target: "[target](#target)",
    Verification: "[verify](#verify)",
    Goal: "[goal](#goals)",
    Search: "[search](#search)",
    Evaluator: "evaluator",
}


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|").replace("*.", "\\*.")


def pages() -> dict[Path, str]:
    """Return every generated file with its text."""
    texts = {"commands.md": commands(), "passes.md": passes(), "evaluators.md": evaluators()}
    return {DOCS / name: text for name, text in texts.items()} | {schema.FILE: schema.text()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.name)
