"""``olive auto-opt`` (also ``olive optimize``): an optimized ONNX model for a target."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser, add_fields, add_model, given, read_model
from olive.cli.run import add_flow, execute

OPTIONS = [
    "precision", "algorithm", "group_size", "symmetric", "lm_head", "embeddings", "accuracy_level", "logits",
    "kv_cache", "context_length", "chunk_size", "adapter_precision",
]  # fmt: skip
TARGET = ["device", "provider"]


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    from olive.passes.decoder import Decoder
    from olive.target import Target

    own = Parser(prog, "Build an ONNX model for ONNX Runtime GenAI, with an adapter as optional inputs.")
    add_model(own, adapter=True)
    add_fields(own, Target, TARGET)
    add_fields(own, Decoder, OPTIONS)
    own.add_argument(
        "--use_ort_genai",
        action="store_true",
        help="Write genai_config.json and the tokenizer files: the default for language models.",
    )
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Build the model."""
    workflow = {
        "input_model": read_model(args, "olive auto-opt"),
        "target": given(args, TARGET),
        "passes": [{"type": "decoder", **given(args, OPTIONS)}],
    }
    return execute(workflow | given(args, {"output_dir": "output_path"}), args)
