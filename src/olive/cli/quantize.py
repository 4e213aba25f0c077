"""``olive quantize``: a quantized Hugging Face folder from a float one."""

from __future__ import annotations

import argparse
from typing import get_args

from olive.cli.options import Parser, add_data, add_fields, add_model, read_data, read_model
from olive.cli.options import given as given_flags
from olive.cli.run import add_flow, execute
from olive.errors import ConfigError

ALGORITHMS = ("rtn", "awq", "gptq")
OPTIONS = ["group_size", "format", "exclude"]


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    from olive.passes.quantizer import Quantizer

    own = Parser(prog, "Quantize the linear layers of a Hugging Face checkpoint.")
    add_model(own)
    own.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="rtn",
        help="rtn: round to nearest, no data; awq, gptq: fitted to calibration data. Default: rtn.",
    )
    own.add_argument(
        "--precision", choices=["int4", "int8"], help="Bits that are written. Default: the algorithm's (int4)."
    )
    add_fields(own, Quantizer, OPTIONS, without_default=("format",))
    way = own.add_mutually_exclusive_group()
    text = Quantizer.model_fields["symmetric"].description
    way.add_argument("--symmetric", action="store_true", help=text)
    way.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="Fit a zero point per group (default)."
    )
    add_data(own)
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Run one quantizer."""
    from olive.passes import pass_class

    kind = pass_class(args.algorithm)
    step = {"type": args.algorithm, **given_flags(args, [*OPTIONS, "symmetric"])}
    if hasattr(args, "precision"):
        step["bits"] = int(args.precision.removeprefix("int"))
        allowed = get_args(kind.model_fields["bits"].annotation)
        if step["bits"] not in allowed:
            names = ", ".join(f"int{bits}" for bits in allowed)
            raise ConfigError(f"--precision {args.precision}: {args.algorithm} does not do that; it does {names}")
    data = read_data(args)
    if data is not None and "data" not in kind.model_fields:
        raise ConfigError(f"--algorithm {args.algorithm} uses no data; drop the data options or use --algorithm awq")
    if data is not None:
        step["data"] = data
    workflow = {"input_model": read_model(args, "olive quantize"), "passes": [step]}
    return execute(workflow | given_flags(args, {"output_dir": "output_path"}), args)
