"""``olive auto-opt`` (also ``olive optimize``): an optimized ONNX model for a target."""

from __future__ import annotations

import argparse
from typing import Any

from olive.cli.options import Parser, add_fields, add_model, given, read_model
from olive.cli.run import add_flow, execute
from olive.errors import ConfigError

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
    own.add_argument(
        "--goal",
        dest="goals",
        action="append",
        metavar="GOAL",
        help='Search for options that meet this, as in "kl_divergence<=0.05", "tokens_per_second>=20" or "size_on_disk '
        'minimal" (repeatable). What is tried comes from a recipe for the target; options given here stay as given.',
    )
    own.add_argument("--trials", type=int, metavar="N", help="Try this many combinations at most. Default: 20.")
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Build the model, or search for the one that meets the goals."""
    if hasattr(args, "trials") and not hasattr(args, "goals"):
        raise ConfigError("olive auto-opt: --trials: give what to search for too, as in --goal 'kl_divergence<=0.05'")
    if hasattr(args, "goals"):
        return execute(goal_template(args), args)
    workflow = {
        "input_model": read_model(args, "olive auto-opt"),
        "target": given(args, TARGET),
        "passes": [{"type": "decoder", **given(args, OPTIONS)}],
    }
    return execute(workflow | given(args, {"output_dir": "output_path"}), args)


def goal_template(args: argparse.Namespace) -> dict[str, Any]:
    """Return the template that the flags stand for: a recipe's, for the target, with the goals."""
    from olive.config import parse
    from olive.recipes import template
    from olive.target import Target

    model = read_model(args, "olive auto-opt")
    target = parse(Target, given(args, TARGET), "olive auto-opt: ")
    fixed = "adapter_path" in model or _is_fixed(model)
    data = template(target, fixed=fixed, options=given(args, OPTIONS))
    if hasattr(args, "trials"):
        data["search"] = data["search"] | {"trials": args.trials}
    return {"input_model": model, **data, "goals": args.goals} | given(args, {"output_dir": "output_path"})


def _is_fixed(model: dict[str, Any]) -> bool:
    """Tell whether a checkpoint is quantized already or has an adapter, so that only its graph is open."""
    from olive.model import open_model
    from olive.quant.formats.checkpoint import read_config
    from olive.remote import fetch

    folder, _ = fetch(model["path"], model.get("revision"))
    opened = open_model(folder)
    if opened.kind != "hf":
        raise ConfigError(f"{folder}: is an ONNX model; give the checkpoint that it was made from")
    return bool(opened.adapters) or bool(read_config(opened.path).get("quantization_config"))
