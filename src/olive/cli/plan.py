"""``olive plan FILE``: what a workflow file would do, step by step, and what that would need."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser
from olive.cli.run import add_file, add_flow, main_with


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Print what a workflow file would do, and stop: the same as olive run FILE --dry_run.")
    add_file(own)
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Read the file and print its plan."""
    args.dry_run = True
    return main_with(args, "olive plan")
