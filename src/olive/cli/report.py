"""``olive report``: the page of a report, made again from its JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from olive.cli.options import Parser
from olive.cli.run import add_log_level
from olive.errors import ConfigError


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Make the HTML page of a report again from its JSON.")
    own.add_argument("report", nargs="?", metavar="FILE", help="The report: OUTPUT.report.json.")
    own.add_argument(
        "-o", "--output_path", metavar="FILE", help="File of the page (default: beside the report, as .html)."
    )
    own.add_argument("--overwrite", action="store_true", help="Replace a file that is not a page of ours.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Write one page."""
    from pydantic import TypeAdapter, ValidationError

    from olive.config import load
    from olive.html import page
    from olive.plan import check_beside
    from olive.report import StepRecord

    if not hasattr(args, "report"):
        raise ConfigError("olive report: give a report: olive report OUTPUT.report.json")
    source = Path(args.report)
    report = load(source)
    if not isinstance(report, dict) or not {"workflow", "output", "steps"} <= report.keys():
        raise ConfigError(f"{source}: not a report; Olive writes one beside each output, as OUTPUT.report.json")
    try:
        TypeAdapter(list[StepRecord]).validate_python(report["steps"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("steps", *first["loc"])))
        raise ConfigError(f"{source}: {place}: damaged: {first['msg'].lower()}; run its workflow again, which takes "
                          "seconds where the cache has the result") from None  # fmt: skip
    target = Path(args.output_path) if hasattr(args, "output_path") else source.with_suffix(".html")
    check_beside(target, "report.html", hasattr(args, "overwrite"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
    print(target)
    return 0
