"""``olive run FILE``, and the road that every other command takes too: workflow -> plan -> engine -> report."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.options import Parser, add_fields, given
from olive.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from olive.cache import Cache
    from olive.report import Report

VERIFY = {"level": "verify", "max_kl": "max_kl", "tokenizer": "verify_tokenizer"}
SEARCH = ["sampler", "trials", "time", "workers", "study"]


def parser(prog: str) -> Parser:
    """Return the parser of ``olive run``."""
    from olive.workflow import Search

    text = "Run a workflow file: YAML or JSON with input_model, passes and output_dir. Holes in it are searched over."
    own = Parser(prog, text)
    add_file(own)
    add_fields(own, Search, SEARCH)
    add_flow(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Read the file and run it; flags override what it says."""
    return main_with(args, "olive run")


def add_file(own: Parser) -> None:
    """Add the flags that name a workflow file and change what it says."""
    own.add_argument("config", nargs="?", metavar="FILE", help="The workflow file, or the name of a recipe.")
    own.add_argument("--config", dest="config_flag", metavar="FILE", help="The workflow file, as a flag.")
    own.add_argument(
        "--set",
        dest="assignments",
        nargs="+",
        action="extend",
        metavar="PATH=VALUE",
        help="Change what the file says: passes.awq.bits=8 (a pass by its type or its index, values as in YAML).",
    )
    own.add_argument(
        "--skip_unknown",
        action="store_true",
        help="Of a file of Microsoft Olive, leave out the passes that have no counterpart here.",
    )


def main_with(args: argparse.Namespace, command: str) -> int:
    """Read the workflow file that the flags name and run it, or print its plan."""
    from olive.search.space import is_template, read_space
    from olive.workflow import read_workflow

    name = getattr(args, "config", None) or getattr(args, "config_flag", None)
    if name is None:
        raise ConfigError(f"{command}: give a workflow file: {command} workflow.yaml")
    data = read_file(name, args)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping, got {type(data).__name__}")
    if hasattr(args, "output_path"):
        data["output_dir"] = args.output_path
    if "output_dir" in data:
        (read_space if is_template(data) else read_workflow)(data, name)  # so that mistakes have the file's name
    return execute(data, args)


def read_file(name: str, args: argparse.Namespace) -> Any:
    """Read a workflow file, one of Microsoft Olive's, or a recipe; make the assignments of the flags."""
    from olive.compat import convert, is_foreign
    from olive.config import load
    from olive.recipes import names, recipe

    path = Path(name)
    if not path.exists() and not path.suffix and path.name == name:
        if name not in names():
            raise ConfigError(f"{name}: no such file, and no recipe is called so{did_you_mean(name, names())}")
        data: Any = recipe(name)
    else:
        data = load(path)
    if is_foreign(data):
        converted = convert(data, name, skip_unknown=hasattr(args, "skip_unknown"))
        data = converted.data
        for note in converted.notes:
            print(f"note: {note}", file=sys.stderr)
    if hasattr(args, "assignments"):
        from olive.assign import assign

        data = assign(data, args.assignments)
    return data


def add_flow(own: Parser) -> None:
    """Add the flags that every command with a workflow has."""
    from olive.workflow import Verification, Workflow

    own.add_argument("-o", "--output_path", metavar="FOLDER", help="Folder of the result.")
    add_fields(own, Verification, VERIFY)
    add_fields(own, Workflow, ["compute_device", "seed"])
    own.add_argument("--overwrite", action="store_true", help="Replace an output that is not ours or was changed.")
    own.add_argument("--no_cache", action="store_true", help="Neither read nor write the cache.")
    own.add_argument("--dry_run", action="store_true", help="Print the plan and stop.")
    own.add_argument(
        "--save_config_file",
        nargs="?",
        const="",
        metavar="FILE",
        help="Write the workflow file that this command stands for (default: OUTPUT_PATH.yaml).",
    )
    add_log_level(own)


def add_log_level(own: Parser) -> None:
    """Add the flag for how much is logged."""
    own.add_argument(
        "--log_level",
        type=int,
        choices=range(5),
        default=2,
        help="0 debug, 1 info, 2 warning, 3 error, 4 critical. Default: 2.",
    )


def execute(data: dict[str, Any], args: argparse.Namespace) -> int:
    """Run a workflow given as plain data, with the flags of :func:`add_flow` applied; search a template first."""
    from olive.search.space import is_template
    from olive.workflow import as_yaml, read_workflow

    verify = given(args, VERIFY)
    data = data | ({"verify": (data.get("verify") or {}) | verify} if verify else {})
    data |= given(args, ["compute_device", "seed"])
    if "output_dir" not in data:
        raise ConfigError("--output_path (-o) is required: the folder of the result")
    searched = given(args, SEARCH)
    if is_template(data):
        from olive.cli.search import execute_template

        return execute_template(data | {"search": (data.get("search") or {}) | searched}, args)
    workflow = read_workflow(data, "workflow")
    if searched or workflow.search is not None:
        told = f"--{next(iter(searched))}" if searched else "search"
        raise ConfigError(f"{told}: no option of the workflow is a hole, so there is nothing to search")
    if hasattr(args, "save_config_file"):
        save(as_yaml(workflow), Path(args.save_config_file or f"{workflow.output_dir}.yaml"), args)
        if hasattr(args, "write_only"):
            return 0
    overwrite, most = hasattr(args, "overwrite"), max_size()
    with open_cache(args, Path(workflow.output_dir)) as cache:
        from olive.fits import check
        from olive.plan import plan

        planned = plan(workflow, cache, overwrite=overwrite)
        if hasattr(args, "dry_run"):
            from olive.cli.plan_text import lines

            for line in lines(planned, cache):
                print(line)
            check(planned, cache)
            return 0
        check(planned, cache)
        from olive.engine import run

        with show_progress() as progress, cache.using():
            report = run(planned, cache, overwrite=overwrite, progress=progress)
        if most is not None:
            from olive.inventory import collect

            collect(cache, most)
    report.command = getattr(args, "command_line", "")
    say(report, planned.output)
    return 0


def max_size() -> int | None:
    """Return the bytes that the cache is kept under after a run, if OLIVE_CACHE_MAX_SIZE is set."""
    text = os.environ.get("OLIVE_CACHE_MAX_SIZE")
    if not text:
        return None
    from olive.inventory import read_size

    return read_size(text, "OLIVE_CACHE_MAX_SIZE")


def say(report: Report, output: Path) -> None:
    """Print the report, and write it beside the output."""
    saved = write_report(report, output)
    for line in report.lines():
        print(line)
    print(f"{'report':<12} {saved}")


def write_report(report: Report, output: Path) -> Path:
    """Write a report beside its output, as data, as a page (whose path is returned) and, if there is one, the lock."""
    from olive.html import page
    from olive.lock import write_lock
    from olive.plan import beside

    report.save(beside(output, "report.json"))
    saved = beside(output, "report.html")
    saved.write_text(page(report.as_data()), encoding="utf-8")
    if report.lock:
        write_lock(report.lock, beside(output, "lock.json"))
    return saved


@contextmanager
def open_cache(args: argparse.Namespace, output: Path) -> Iterator[Cache]:
    """Open the cache, or with ``--no_cache`` a store that ends with the run."""
    from olive.cache import Cache, default_root, sweep
    from olive.shared import configured

    if not hasattr(args, "no_cache"):
        yield Cache(default_root(), configured())
        return
    # A store of its own that ends with the run: one way of running, whether results are kept or not. It lies on the
    # output's disk, so that large files are moved there by link.
    place = next(p for p in output.expanduser().resolve().parents if p.is_dir())
    sweep(place, ".olive-building.*")
    folder = place / f".olive-building.{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({place}: {error.strerror}); choose another place") from None
    try:
        yield Cache(folder, kept=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def show_progress() -> Iterator[Any]:
    """Show a progress bar on a terminal; elsewhere log each stage once."""
    if sys.stderr is None or not sys.stderr.isatty():
        seen: set[str] = set()

        def say(what: str, *_: int) -> None:
            if what not in seen:
                logging.getLogger("olive").info("%s ...", what)
                seen.add(what)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield move


def save(text: str, path: Path, args: argparse.Namespace) -> None:
    if path.is_dir():
        raise ConfigError(f"--save_config_file {path}: is a folder; give a file")
    if path.exists() and path.read_bytes() != text.encode() and not hasattr(args, "overwrite"):
        raise ConfigError(f"--save_config_file {path}: exists with other contents; give another file or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save_config_file {path}: cannot be written: {error.strerror}") from None
    print(f"workflow written to {path}", file=sys.stderr)
