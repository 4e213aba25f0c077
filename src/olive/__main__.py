"""The ``olive`` command."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def run() -> None:
    """Run the command line and exit with its code."""
    from olive.cli import main

    if isinstance(sys.stdout, TextIOWrapper):  # as stderr does with what the terminal has no letter for
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
