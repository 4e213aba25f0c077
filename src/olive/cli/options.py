"""Flags: generated from the fields of passes and data specs, so that help and defaults are stated once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from olive.config import Config
from olive.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are :class:`ConfigError`."""

    def __init__(self, prog: str, description: str, *, passes_on: bool = False) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.passes_on = passes_on
        """Unknown flags are kept in ``args.more`` for somebody else to read."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")

    def flags(self) -> list[str]:
        """Return every flag."""
        return [flag for action in self._actions for flag in action.option_strings]


def normalize(argv: Sequence[str]) -> list[str]:
    """Spell flags with underscores: ``--output-path=x`` is ``--output_path=x``."""
    found, literal = [], False
    for word in argv:
        literal = literal or word == "--"
        if word.startswith("--") and not literal:
            name, eq, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + eq + value
        found.append(word)
    return found


def parse_arguments(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; an unknown flag is an error that names the nearest known one."""
    args, more = parser.parse_known_intermixed_args(argv)
    if more and not parser.passes_on:
        flag = more[0].split("=")[0]
        if flag.startswith("-"):
            raise ConfigError(f"{parser.prog}: unknown option {flag}{_nearest(flag, parser.flags())}")
        raise ConfigError(f"{parser.prog}: unexpected argument {more[0]!r}; options start with --")
    args.more = more
    return args


def _nearest(flag: str, flags: list[str]) -> str:
    hint = did_you_mean(flag, [f for f in flags if f.startswith("--")])
    return hint if "did you mean" in hint else "; --help lists the options"


def add_fields(
    parser: Parser,
    config: type[Config],
    names: Mapping[str, str] | Sequence[str],
    *,
    without_default: Sequence[str] = (),
) -> None:
    """Add a flag for each named field of ``config``; a mapping gives flags other names than their fields. Defaults
    are told, but for the fields in ``without_default`` (they vary among the classes that share the field)."""
    flags = names if isinstance(names, Mapping) else {name: name for name in names}
    for name, flag in flags.items():
        field = config.model_fields[name]
        text = re.sub(r"\s+", " ", field.description or "").replace("%", "%%")
        told = isinstance(field.default, (str, int, float)) and field.default != "" and field.default is not False
        if told and name not in without_default:
            text += f" Default: {field.default}."
        spelled = [*SHORT.get(flag, ()), f"--{flag}"]
        kind = _plain(field.annotation)
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(*spelled, dest=flag, action=action, help=text)
        elif get_origin(kind) is Literal:
            values = get_args(kind)
            parser.add_argument(*spelled, dest=flag, type=type(values[0]), choices=values, help=text)
        elif get_origin(kind) is dict:
            metavar = "PATTERN=VALUE"
            parser.add_argument(*spelled, dest=flag, nargs="+", action=_Pairs, metavar=metavar, help=text)
        elif get_origin(kind) is tuple:
            parser.add_argument(*spelled, dest=flag, nargs="+", metavar="VALUE", help=text)
        else:
            parser.add_argument(
                *spelled, dest=flag, type=kind if kind in (int, float) else str, metavar="VALUE", help=text
            )


class _Pairs(argparse.Action):
    """Collects ``A=B`` words into a mapping."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        found = {}
        for word in values:
            name, equals, value = word.rpartition("=")
            if not equals:
                parser.error(f"{flag} {word}: give PATTERN=VALUE")
            found[name] = value
        setattr(namespace, self.dest, found)


SHORT = {"model_name_or_path": ("-m",), "adapter_path": ("-a",), "data_name": ("-d",), "output_path": ("-o",)}


def _plain(annotation: Any) -> Any:
    """Reduce ``X | None`` to X, ``str | tuple`` to tuple, and ``int | str`` to str."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in (Literal, tuple, dict) or not parts:
        return annotation
    return next((part for part in parts if get_origin(part) is tuple), str if str in parts else parts[0])


def given(args: argparse.Namespace, names: Mapping[str, str] | Sequence[str]) -> dict[str, Any]:
    """Return the fields that were given as flags; what was not keeps its field's default."""
    flags = names if isinstance(names, Mapping) else {name: name for name in names}
    return {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}


MODEL = {"path": "model_name_or_path", "revision": "revision", "trust_remote_code": "trust_remote_code"}
DATA = {
    "name": "data_name",
    "files": "data_files",
    "subset": "subset",
    "split": "split",
    "text_field": "text_field",
    "text_template": "text_template",
    "use_chat_template": "use_chat_template",
    "max_samples": "max_samples",
    "max_seq_len": "max_seq_len",
}
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def add_model(parser: Parser, *, adapter: bool = False) -> None:
    """Add the flags that name the input model."""
    from olive.workflow import InputModel

    add_fields(parser, InputModel, MODEL | ({"adapter_path": "adapter_path"} if adapter else {}))
    parser.add_argument(
        "-t",
        "--task",
        choices=["text-generation", "text-generation-with-past"],
        help="Task of the model; text generation is the only one.",
    )


def add_data(parser: Parser) -> None:
    """Add the flags that name data."""
    from olive.data.spec import DataSpec

    add_fields(parser, DataSpec, DATA)


def read_model(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Return the workflow's ``input_model``."""
    if not hasattr(args, "model_name_or_path"):
        raise ConfigError(f"{command}: --model_name_or_path (-m) is required: a Hugging Face id or a local folder")
    return given(args, MODEL | {"adapter_path": "adapter_path"})


def read_data(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the data spec that the flags describe, or None where no flag names data."""
    from pathlib import Path

    found = given(args, DATA)
    if "files" in found:
        split = [part for value in found["files"] for part in ([value] if Path(value).exists() else value.split(","))]
        found["files"] = [part for part in split if part]
        kinds = {SUFFIXES.get(Path(part).suffix) for part in found["files"]}
        if "name" not in found and len(kinds) == 1 and None not in kinds:
            found["name"] = kinds.pop()
        elif "name" not in found:
            raise ConfigError(
                f"--data_files {' '.join(found['files'])}: give --data_name too (text, json, csv, parquet)"
            )
    return found or None
