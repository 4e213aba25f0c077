"""``olive quantize``: a quantized Hugging Face folder from a float one."""

from __future__ import annotations

import argparse

from olive.cli.options import Parser, add_data, add_fields, add_model, read_data, read_model
from olive.cli.options import given as given_flags
from olive.cli.run import add_flow, execute
from olive.errors import ConfigError

ALGORITHMS = ("rtn", "kquant", "hqq", "awq", "gptq", "tune", "distill", "best")
OPTIONS = ["group_size", "format", "exclude", "overrides", "lm_head", "embeddings"]
BUDGET = ["target_size", "kl_budget", "size_of", "sensitivities"]
OWN = {
    "iterations": "tune",
    "steps": "distill",
    "own_rows": "distill",
    "statistics": "awq",
    "save_statistics": "awq",
    "budget": "best",
}
"""Options of some algorithms only, and one that has it."""


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    from olive.passes import pass_class
    from olive.passes.quantizer import Quantizer

    own = Parser(prog, "Quantize the linear layers of a Hugging Face checkpoint.")
    add_model(own)
    own.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="rtn",
        help="Without data: rtn (round to nearest), kquant (searched ranges; with data, by importance), hqq. Fitted to "
        "calibration data: awq, gptq, tune (more accurate, slower), distill (trains what tune gives: most accurate, on "
        "a GPU). best: tries several and keeps the one that is nearest to the float model on held-back rows. "
        "Default: rtn.",
    )
    own.add_argument(
        "--compare",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="Try these algorithms on the same rows, tell quality, size and time of each, and keep the best.",
    )
    own.add_argument(
        "--precision", choices=["int2", "int3", "int4", "int8"], help="Bits that are written. Default: int4."
    )
    add_fields(own, Quantizer, [*OPTIONS, *BUDGET], without_default=("format",))
    for option, owner in OWN.items():
        add_fields(own, pass_class(owner), [option])
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

    algorithm = args.algorithm
    if hasattr(args, "compare"):
        if algorithm != "rtn":
            raise ConfigError(f"--compare names the algorithms by itself; drop --algorithm {algorithm}")
        algorithm = "best"
    kind = pass_class(algorithm)
    step = {"type": algorithm, **given_flags(args, [*OPTIONS, *BUDGET, *OWN, "symmetric"])}
    for option in OWN:
        if option in step and option not in kind.model_fields:
            having = ", ".join(name for name in ALGORITHMS if option in pass_class(name).model_fields)
            raise ConfigError(f"--{option}: {algorithm} has no such option; these have: {having}")
    if hasattr(args, "compare"):
        step["candidates"] = [{"type": name} for name in args.compare]
    if hasattr(args, "precision"):
        step["bits"] = int(args.precision.removeprefix("int"))
    budget = next((name for name in BUDGET[:2] if name in step), None)
    chosen = [flag for flag in ("precision", "group_size") if budget and hasattr(args, flag)]
    if chosen:
        raise ConfigError(f"--{chosen[0]}: --{budget} chooses it for each layer; drop one of the two")
    data = read_data(args)
    if data is not None and not budget and not getattr(kind, "fitted", False):
        raise ConfigError(f"--algorithm {algorithm} uses no data; drop the data options or use --algorithm awq")
    if data is not None:
        step["data"] = data
    workflow = {"input_model": read_model(args, "olive quantize"), "passes": [step]}
    return execute(workflow | given_flags(args, {"output_dir": "output_path"}), args)
