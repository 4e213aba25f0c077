"""``olive convert-adapters``: one more adapter for an ONNX model, without building it again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from olive.cli.options import Parser
from olive.cli.run import add_log_level
from olive.errors import ConfigError
from olive.model import open_model, read_manifest


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Convert a PEFT adapter to an .onnx_adapter file for a folder that auto-opt wrote.")
    own.add_argument("-a", "--adapter_path", metavar="FOLDER", help="Folder of the PEFT adapter.")
    own.add_argument("-m", "--model_name_or_path", metavar="FOLDER", help="The ONNX model's folder.")
    own.add_argument("-o", "--output_path", metavar="FILE", help="The file to write (NAME.onnx_adapter).")
    own.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Convert one adapter; a misfit is refused with the first tensor that differs."""
    for name in ("adapter_path", "model_name_or_path", "output_path"):
        if not hasattr(args, name):
            raise ConfigError(f"olive convert-adapters: --{name} is required")
    model = open_model(Path(args.model_name_or_path))
    if model.kind != "onnx":
        raise ConfigError(f"{model.path}: is not an ONNX model; give the folder that auto-opt wrote")
    out = Path(args.output_path)
    if out.suffix != ".onnx_adapter":
        raise ConfigError(f"{out}: give a file name that ends in .onnx_adapter")
    if out.exists() and not hasattr(args, "overwrite"):
        raise ConfigError(f"{out}: exists; give another name or --overwrite")
    from olive.decoder.lora import convert

    if read_manifest(out.parent) or read_manifest(out.parent.parent):
        print(f"note: {out.parent} is an output of olive; it counts as changed with this file in it", file=sys.stderr)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; choose another place") from None
    found = convert(Path(args.adapter_path), model.path, out)
    print(f"{out}: {len(found.tensors)} tensors, {out.stat().st_size / 1e6:.2f} MB")
    return 0
