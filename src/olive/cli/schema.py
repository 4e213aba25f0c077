"""``olive schema``: the JSON schema of a workflow file, for editors."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser
from olive.cli.run import add_log_level


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Print the JSON schema of a workflow file, with the options of every pass.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:  # noqa: ARG001
    """Print the shipped file."""
    from olive.schema import FILE

    print(FILE.read_text(encoding="utf-8"), end="")
    return 0
