"""``olive evaluate``: metrics of a model, beside those of another."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.comparison import Column, as_data, show, table
from olive.cli.options import DATA, Parser, add_data, add_fields, given, read_data
from olive.cli.run import add_log_level
from olive.errors import ConfigError, did_you_mean
from olive.model import open_model

if TYPE_CHECKING:
    from olive.evaluate.evaluators import Evaluator, Measuring

HARNESS = ["tasks", "include_path", "num_fewshot", "limit", "batch_size", "max_length", "apply_chat_template"]
SPEED = ["prompt_tokens", "new_tokens", "warmup", "rounds"]
ACCURACY = ["label_field", "max_new_tokens"]
DEFAULT = ("perplexity", "size_on_disk")
DEFAULT_AGAINST = ("perplexity", "kl_divergence", "top1_agreement", "size_on_disk")


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    from olive.evaluate.accuracy import Accuracy
    from olive.evaluate.harness import LmEval
    from olive.evaluate.latency import Latency
    from olive.evaluate.metrics import METRICS
    from olive.evaluate.speed import Speed
    from olive.workflow import Workflow

    own = Parser(prog, "Measure a model: a checkpoint, float or quantized, or an ONNX folder; beside another if given.")
    own.add_argument("model", nargs="?", metavar="MODEL", help="Folder or Hugging Face id of the model.")
    own.add_argument("-m", "--model_name_or_path", metavar="MODEL", help="The model, as a flag.")
    own.add_argument("--against", metavar="OTHER", help="The model to compare with, usually the float one.")
    own.add_argument("--adapter", metavar="NAME", help="Adapter that the model uses: a name, file or folder. "
                     "Without it the base alone is measured, also of a folder with an adapter.")  # fmt: skip
    own.add_argument("--against_adapter", metavar="NAME", help="Adapter that the other model uses.")
    own.add_argument(
        "--metrics",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help=f"What to measure: {', '.join(METRICS)}. Default: {', '.join(DEFAULT)}; with --against "
        f"{', '.join(DEFAULT_AGAINST)}.",
    )
    own.add_argument("--trust_remote_code", action="store_true", help="Run Python code that comes with the model.")
    add_data(own)
    add_fields(own, LmEval, HARNESS)
    add_fields(own, Accuracy, ACCURACY)
    add_fields(own, Speed, SPEED, without_default=("warmup", "rounds"))
    add_fields(own, Latency, ["dims"])
    own.add_argument("--function", metavar="FILE.py:NAME", help="A Python function that measures the model too.")
    own.add_argument("--direction", choices=["minimize", "maximize"], help="Which way the function's number is better.")
    add_fields(own, Workflow, ["compute_device", "seed"])
    own.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    from olive.evaluate.evaluators import Measuring
    from olive.target import compute_device

    path = getattr(args, "model", None) or getattr(args, "model_name_or_path", None)
    if path is None:
        raise ConfigError("olive evaluate: give a model: olive evaluate FOLDER")
    columns = [_column(path, getattr(args, "adapter", None), args)]
    if hasattr(args, "against"):
        columns.append(_column(args.against, getattr(args, "against_adapter", None), args))
    elif hasattr(args, "against_adapter"):
        raise ConfigError("--against_adapter: is for the model that --against names; give that too")
    asked, evaluators = _evaluators(args, against=len(columns) > 1)
    seed = getattr(args, "seed", 0)
    if seed < 0:
        raise ConfigError(f"--seed {seed}: give a whole number from 0")
    with tempfile.TemporaryDirectory(prefix="olive-evaluate-") as kept:
        other = columns[-1]
        ctx = Measuring(
            source=other.model if len(columns) > 1 else None,
            source_adapter=other.adapter if len(columns) > 1 else None,
            compute_device=compute_device(getattr(args, "compute_device", "auto")),
            seed=seed,
            cache_dir=Path(kept),
        )
        for column in reversed(columns):  # what the other's logits come from is then at hand
            _measure(column, evaluators, ctx, first=column is columns[0])
    known = {name: metric for evaluator in evaluators for name, metric in evaluator.metrics().items()}
    metrics = {name: known[name] for name in asked}
    if hasattr(args, "json"):
        print(json.dumps(as_data(columns, metrics), indent=1, ensure_ascii=False))
        return 0
    show(table(columns, metrics))
    return 0


def _column(path: str, adapter: str | None, args: argparse.Namespace) -> Column:
    from olive.remote import fetch

    model = open_model(fetch(path)[0], trust_remote_code=hasattr(args, "trust_remote_code"))
    if adapter is None:
        return Column(path, model, None)
    file = model.adapters.get(adapter, Path(adapter))
    if not file.exists():
        raise ConfigError(f"adapter {adapter}: neither one of {model.path} nor a path; its own: "
                          f"{', '.join(model.adapters) or 'none'}")  # fmt: skip
    if model.kind == "hf" and not (file / "adapter_config.json").is_file():
        raise ConfigError(f"adapter {file}: not a PEFT adapter folder (no adapter_config.json)")
    return Column(path, model, file)


def _evaluators(args: argparse.Namespace, *, against: bool) -> tuple[list[str], list[Evaluator]]:
    """Return the metrics that were asked for, in order, and the evaluators that give them."""
    from olive.evaluate.evaluators import EVALUATORS, evaluator_class
    from olive.evaluate.metrics import METRICS

    asked = list(dict.fromkeys(getattr(args, "metrics", ())))
    own = _lm_eval(args) + _function(args)
    if not asked and not own:
        asked = list(DEFAULT_AGAINST if against else DEFAULT)
    for name in asked:
        if name not in METRICS:
            raise ConfigError(f"--metrics {name}: no such metric{did_you_mean(name, METRICS)}")
    found: list[Evaluator] = []
    for kind in EVALUATORS:
        wanted = [name for name in asked if name in evaluator_class(kind).names]
        if wanted:
            found.append(_evaluator(kind, wanted, args, against=against))
    _check_used(args, found + own)
    return [*asked, *(name for evaluator in own for name in evaluator.metrics())], found + own


def _check_used(args: argparse.Namespace, evaluators: Sequence[Evaluator]) -> None:
    """Refuse a flag that nothing which is measured takes: the figures would look as if it counted."""
    from olive.evaluate.evaluators import evaluator_name

    taken = {field for evaluator in evaluators for field in type(evaluator).model_fields}
    flags = dict.fromkeys([*HARNESS, *ACCURACY, *SPEED, "dims", "direction"])
    unused = [flag for flag in flags if hasattr(args, flag) and flag not in taken]
    unused += [flag for flag in DATA.values() if hasattr(args, flag) and "data" not in taken]
    if unused:
        names = ", ".join(evaluator_name(evaluator) for evaluator in evaluators)
        raise ConfigError(f"--{unused[0]}: nothing that is measured ({names}) takes it; drop it, or ask for what does")


def _evaluator(kind: str, wanted: list[str], args: argparse.Namespace, *, against: bool) -> Evaluator:
    from olive.config import parse
    from olive.evaluate.evaluators import evaluator_class

    options: dict[str, Any] = {}
    data = read_data(args)
    if kind == "quality":
        options["compare"] = wanted != ["perplexity"]
        if options["compare"] and not against:
            raise ConfigError(f"--metrics {','.join(wanted)}: compare with another model; give --against")
    if kind in ("quality", "accuracy") and data is not None:
        options["data"] = data
    if kind == "accuracy":
        if {"accuracy", "exact_match"} <= set(wanted):
            raise ConfigError(
                "--metrics: accuracy is for classifiers and exact_match for what generates; give one of them"
            )
        options["task"] = "classification" if "accuracy" in wanted else "generation"
        options |= given(args, [*ACCURACY, "batch_size"])
    if kind == "speed":
        options |= given(args, SPEED)
    if kind == "latency":
        options |= given(args, ["dims", "warmup", "rounds"])
    if kind == "memory":
        options |= given(args, ["dims", "prompt_tokens", "new_tokens"])
    return parse(evaluator_class(kind), options, f"{kind}: ")


def _lm_eval(args: argparse.Namespace) -> list[Evaluator]:
    if not hasattr(args, "tasks"):
        return []
    from olive.config import parse
    from olive.evaluate.harness import LmEval

    tasks = [part for word in args.tasks for part in word.split(",") if part]
    return [parse(LmEval, given(args, HARNESS) | {"tasks": tasks}, "lm_eval: ")]


def _function(args: argparse.Namespace) -> list[Evaluator]:
    if not hasattr(args, "function"):
        return []
    from olive.config import parse
    from olive.evaluate.function import Function

    file, colon, name = args.function.rpartition(":")
    if not colon or not hasattr(args, "direction"):
        raise ConfigError(f"--function {args.function}: give FILE.py:NAME, and --direction minimize or maximize")
    return [parse(Function, {"file": file, "function": name, "direction": args.direction}, "function: ")]


def _measure(column: Column, evaluators: Sequence[Evaluator], ctx: Measuring, *, first: bool) -> None:
    from olive.evaluate.evaluators import evaluator_name, measured
    from olive.evaluate.text import TextQuality

    for evaluator in evaluators:
        name = evaluator_name(evaluator)
        if not first and column.model.kind not in evaluator.kinds:
            continue  # speed of a checkpoint, say: the table has no number there
        if not first and isinstance(evaluator, TextQuality):
            evaluator = evaluator.model_copy(update={"compare": False})
        notes: dict[str, Any] = column.notes.setdefault(name, {})
        if sys.stderr.isatty():
            print(f"{column.title}: {name} ...", file=sys.stderr)
        own = replace(ctx, adapter=column.adapter, note=notes.update)
        column.values |= measured(evaluator, column.model, own)
