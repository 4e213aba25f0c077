"""``olive dequantize``: a plain float checkpoint."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser, add_model, given, read_model
from olive.cli.run import add_flow, execute


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Write the weights of a quantized checkpoint as float32, for any tool to load.")
    add_model(own)
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Dequantize."""
    workflow = {"input_model": read_model(args, "olive dequantize"), "passes": [{"type": "dequantize"}]}
    return execute(workflow | given(args, {"output_dir": "output_path"}), args)
