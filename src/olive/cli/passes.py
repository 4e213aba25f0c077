"""``olive passes [NAME]``: what passes there are, and what one of them does with which options."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser
from olive.cli.run import add_log_level


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "List the passes, or explain one and its options.")
    own.add_argument("name", nargs="?", metavar="NAME", help="The pass to explain.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Print it."""
    from olive.cli.describe import explain, table

    for line in explain(args.name) if hasattr(args, "name") else table():
        print(line)
    return 0
