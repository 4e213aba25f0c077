"""``olive reproduce``: do a run again from its lock file and compare every file of the output."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.cli.options import Parser, given
from olive.cli.run import add_log_level, open_cache, show_progress
from olive.errors import ConfigError, VerifyError

PLACES = {"path": "model", "adapter_path": "adapter_path"}
"""Fields of the input model that say where it lies, and their flags."""


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(
        prog,
        "Do the run of a lock file again, without the cache, and compare the output byte by byte. Exit codes: 0 every "
        "file is equal, 2 the inputs are not those of the lock, 3 some file differs.",
    )
    own.add_argument("lock", nargs="?", metavar="FILE", help="The lock file: OUTPUT.lock.json.")
    own.add_argument("-m", "--model", metavar="PATH", help="Where the input model lies, if not where the lock says.")
    own.add_argument("-a", "--adapter_path", metavar="PATH", help="Where its adapter lies, if not where the lock says.")
    own.add_argument(
        "--data",
        nargs="+",
        metavar="NAME=PATH",
        help="Where data lies, if not where the lock says; the lock names it under data.",
    )
    own.add_argument(
        "--trust_remote_code", action="store_true", help="Run Python code that comes with the model, as the run did."
    )
    own.add_argument(
        "-o", "--output_path", metavar="FOLDER", help="Keep the new output here (default: a temporary folder)."
    )
    own.add_argument("--overwrite", action="store_true", help="Replace a folder that is not ours or was changed.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Do one run again."""
    from olive.lock import read_lock

    if not hasattr(args, "lock"):
        raise ConfigError("olive reproduce: give a lock file: olive reproduce OUTPUT.lock.json")
    locked = read_lock(Path(args.lock))
    if hasattr(args, "output_path"):
        return _reproduce(locked, args, Path(args.output_path).expanduser())
    with tempfile.TemporaryDirectory(prefix="olive-") as folder:
        return _reproduce(locked, args, Path(folder) / Path(locked["workflow"]["output_dir"]).name)


def _reproduce(locked: Mapping[str, Any], args: argparse.Namespace, output: Path) -> int:
    from olive import lock
    from olive.model import read_manifest
    from olive.workflow import read_workflow

    where = lock.places(locked, _moved(getattr(args, "data", [])))
    workflow = lock.workflow_of(locked, where, output)
    workflow["input_model"] = _model(workflow["input_model"], args)
    made = read_workflow(workflow, args.lock)
    args.no_cache = True  # what the cache holds proves nothing
    with open_cache(args, output) as cache:
        from olive.engine import run
        from olive.plan import plan

        planned = plan(made, cache, overwrite=hasattr(args, "overwrite"))
        lock.check_inputs(locked, where, planned, cache.digest)
        with show_progress() as progress:
            run(planned, cache, overwrite=hasattr(args, "overwrite"), progress=progress)
    files = (read_manifest(output) or {})["files"]
    changed = lock.changed_files(locked["files"], files)
    for name in changed:
        state = "only in the lock" if name not in files else "only here" if name not in locked["files"] else "differs"
        print(f"{state:<16} {name}")
    for name, then, now in lock.changed_facts(locked, planned):
        print(f"{name:<16} {then} in the lock, {now} here")
    if changed:
        cached = [step["pass"] for step in locked["steps"] if step["cached"]]
        why = f"; in the locked run {', '.join(cached)} came from a cache, made perhaps elsewhere" if cached else ""
        raise VerifyError(f"{len(changed)} of {len(locked['files'])} files are not what the lock says{why}")
    print(f"{'equal':<16} {len(files)} files, byte by byte")
    if hasattr(args, "output_path"):
        print(f"{'output':<16} {output}")
    return 0


def _moved(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or not place:
            raise ConfigError(f"--data {word}: give NAME=PATH, the name as the lock has it under data")
        found[name] = place
    return found


def _model(given_model: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the lock's input model with what the flags say."""
    if given_model.get("trust_remote_code") and not hasattr(args, "trust_remote_code"):
        raise ConfigError(
            "the lock's run let code of the checkpoint run; look at that code, then give --trust_remote_code"
        )
    model = dict(given_model) | given(args, PLACES)
    if hasattr(args, "model") and Path(args.model).expanduser().exists():
        model.pop("revision", None)
    for name, flag in PLACES.items():
        if name in model and not model.get("revision") and not Path(model[name]).expanduser().exists():
            raise ConfigError(f"{flag}: not at {model[name]}; say where it lies with --{flag} PATH")
    return model
