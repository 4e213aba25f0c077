"""``olive init``: a few questions, then a workflow file and the command that does the same."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from olive.cli.options import Parser, normalize, parse_arguments
from olive.cli.run import add_log_level, save
from olive.errors import ConfigError

KINDS = {
    "checkpoint": "a smaller checkpoint: quantized, for any tool to load",
    "onnx": "an ONNX model for ONNX Runtime",
    "goals": "the ONNX model that meets goals of yours, found by search",
    "adapter": "a LoRA adapter, trained on your data",
}
ALGORITHMS = {
    "rtn": "round to nearest: seconds, no data",
    "kquant": "round to searched ranges: no data",
    "awq": "fitted to calibration data",
    "gptq": "fitted to calibration data, each layer making up for those before it",
    "tune": "fitted to calibration data: more accurate, slower",
    "distill": "the result of tune, trained as a whole: the most accurate, for small models on a GPU",
    "best": "try several and keep the one nearest to the float model",
}
FITTED = ("awq", "gptq", "tune", "distill", "best")
CONTENTS = {"text": "text", "json": "JSON rows", "csv": "CSV", "parquet": "Parquet"}
EXAMPLE_GOAL = "kl_divergence<=0.05"


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Ask what you want, write the workflow file for it and print the command that does the same.")
    own.add_argument("--overwrite", action="store_true", help="Replace a file that has other contents.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Ask, write, print."""
    kind = choose("What do you want?", KINDS)
    model = ask("Which model (Hugging Face id or folder)?")
    command = {"checkpoint": _quantize, "onnx": _auto_opt, "goals": _goals, "adapter": _finetune}[kind](model)
    output = ask("Where should the result go?", f"models/{Path(model).name}-{kind}")
    command += ["--output_path", output]
    file = Path(ask("Where should the workflow file go?", f"{output}.yaml"))
    _write(command, file, args)
    print(f"\nolive {shlex.join(command)}\n\ndoes the same as\n\nolive run {shlex.quote(str(file))}")
    return 0


def _write(command: Sequence[str], file: Path, args: argparse.Namespace) -> None:
    """Write the workflow file that a command stands for."""
    from olive.cli import COMMANDS
    from olive.config import dump
    from olive.search.space import read_space

    module = importlib.import_module(COMMANDS[command[0]][0])
    own = parse_arguments(module.parser(f"olive {command[0]}"), normalize(command[1:]))
    if hasattr(args, "overwrite"):
        own.overwrite = True
    if hasattr(own, "goals"):
        template = module.goal_template(own)
        read_space(template, "olive init")  # a goal that cannot be is told now
        save(dump(template), file, own)
        return
    own.save_config_file, own.write_only = str(file), True
    module.main(own)


def _quantize(model: str) -> list[str]:
    algorithm = choose("Which algorithm?", ALGORITHMS)
    precision = choose("How many bits?", {"int4": "4 bits", "int8": "8 bits", "int3": "3 bits", "int2": "2 bits"})
    layout = ["--format", "gptq"] if algorithm == "awq" and precision != "int4" else []
    command = ["quantize", "-m", model, "--algorithm", algorithm, "--precision", precision, *layout]
    return command + (_data("Calibration data (a text or JSON file; empty: the shipped text)?", "") if
                      algorithm in FITTED else [])  # fmt: skip


def _auto_opt(model: str) -> list[str]:
    command = ["auto-opt", "-m", model, "--device", _device()]
    command += ["--precision", choose("Which precision?", {"int4": "small and fast", "int8": "nearly as good as float",
                                                           "fp32": "float32"})]  # fmt: skip
    adapter = ask("Adapter (a PEFT folder; empty: none)?", "")
    return command + (["--adapter_path", adapter] if adapter else [])


def _goals(model: str) -> list[str]:
    command = ["auto-opt", "-m", model, "--device", _device()]
    goal = ask("A goal, as in kl_divergence<=0.05, tokens_per_second>=20 or 'size_on_disk minimal'?", EXAMPLE_GOAL)
    while goal:
        command += ["--goal", goal]
        goal = ask("Another one (empty: no)?", "")
    return [*command, "--trials", ask("How many combinations may be tried?", "20", number=True)]


def _finetune(model: str) -> list[str]:
    command = ["finetune", "-m", model, *_data("Training data (a text or JSON file)?", None)]
    return [*command, "--max_steps", ask("How many steps?", "100", number=True)]


def _device() -> str:
    return choose("Where will it run?", {"cpu": "a processor", "gpu": "a graphics card"})


def _data(question: str, default: str | None) -> list[str]:
    """Ask for a data file, and for rows of fields how they become text."""
    from olive.cli.options import SUFFIXES

    file = ask(question, default)
    if not file:
        return []
    kind = SUFFIXES.get(Path(file).suffix) or choose("What is in it?", CONTENTS)
    command = ["--data_name", kind, "--data_files", file]
    if kind == "text":
        return command
    return [*command, "--text_template", ask("A row as text, with its fields in braces?", "{prompt}\\n{response}")]


def choose(question: str, options: dict[str, str]) -> str:
    """Ask for one of some options, by number or name; the first is the default."""
    print(question, file=sys.stderr)
    for number, (name, text) in enumerate(options.items(), 1):
        print(f"  {number} {name}: {text}", file=sys.stderr)
    names = list(options)
    while True:
        given = ask("Number or name?", names[0])
        if given.isdigit() and 1 <= int(given) <= len(names):
            return names[int(given) - 1]
        if given in names:
            return given
        print(f"  {given!r} is none of them", file=sys.stderr)


def ask(question: str, default: str | None = None, *, number: bool = False) -> str:
    """Ask until there is an answer."""
    told = f" [{default}]" if default else ""
    while True:
        print(f"{question}{told} ", end="", file=sys.stderr, flush=True)
        try:
            given = input().strip()
        except EOFError:
            raise ConfigError(f"olive init: the answers ended at: {question}") from None
        given = given or (default or "")
        if number and not given.isdigit():
            print(f"  {given!r} is not a whole number", file=sys.stderr)
        elif given or default is not None:
            return given
