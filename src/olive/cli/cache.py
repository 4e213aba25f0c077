"""``olive cache ls|why|gc|verify``: what the cache of finished steps holds, why, and keeping it small and sound."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.options import Parser
from olive.cli.run import add_log_level
from olive.errors import ConfigError, VerifyError

if TYPE_CHECKING:
    from olive.cache import Cache
    from olive.inventory import Item

ACTIONS = ("ls", "why", "gc", "verify")


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(
        prog,
        "The cache of finished steps. ls: list the entries, the longest unused first. why KEY: from what an entry's "
        "key is made; why FILE: what changed against the nearest entries, for a workflow file. gc: remove the longest "
        "unused entries until the cache is small enough; what a running process uses stays. verify: read every file "
        "again and compare it with its digest.",
    )
    own.add_argument("action", choices=ACTIONS, help="What to do.")
    own.add_argument("what", nargs="?", metavar="KEY|FILE", help="For why: the start of a key, or a workflow file.")
    own.add_argument("--max_size", metavar="SIZE", help="For gc: the size to keep under, as in 500MB or 50GB.")
    own.add_argument("--repair", action="store_true", help="For verify: remove damaged entries; they are made again.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Do it."""
    from olive.cache import Cache, default_root

    _check(args)
    cache = Cache(default_root())
    action = {"ls": _ls, "why": _why, "gc": _gc, "verify": _verify}[args.action]
    return action(cache, args)


def _check(args: argparse.Namespace) -> None:
    """Refuse options of another action."""
    for option, owner in (("what", "why"), ("max_size", "gc"), ("repair", "verify")):
        if hasattr(args, option) and args.action != owner:
            given = getattr(args, option) if option == "what" else f"--{option}"
            raise ConfigError(f"olive cache {args.action}: {given}: only olive cache {owner} takes it")
    if args.action == "gc" and not hasattr(args, "max_size"):
        raise ConfigError("olive cache gc: give the size to keep under, as in --max_size 50GB")
    if args.action == "why" and not hasattr(args, "what"):
        raise ConfigError("olive cache why: give the start of a key (olive cache ls lists them) or a workflow file")


def _ls(cache: Cache, args: argparse.Namespace) -> int:  # noqa: ARG001
    from olive.fits import amount
    from olive.inventory import items, total

    found = items(cache)
    if found:
        print(f"{'key':<13}{'made by':<12}{'size':>10}  {'made':<11}{'last used':<11}from")
    for item in found:
        row = f"{item.key[:12]:<13}{item.kind:<12}{amount(item.size):>10}  {_ago(item.made):<11}{_ago(item.used):<11}"
        print(f"{row}{_origin(item)}".rstrip())
    print(f"{len(found)} entries, {amount(total(found))} in {cache.root}")
    return 0


def _origin(item: Item) -> str:
    origin = (item.record or {}).get("origin") or {}
    return str(origin.get("model") or origin.get("step") or "")


def _ago(at: float | None) -> str:
    if at is None:
        return "-"
    from olive.fits import duration

    seconds = max(0.0, time.time() - at)
    return f"{seconds / 86400:.0f} d ago" if seconds > 2 * 86400 else f"{duration(seconds)} ago"


def _why(cache: Cache, args: argparse.Namespace) -> int:
    what = Path(args.what)
    lines = _why_workflow(cache, what, args) if what.is_file() or what.suffix else _why_key(cache, args.what)
    for line in lines:
        print(line)
    return 0


def _why_key(cache: Cache, key: str) -> Iterator[str]:
    from olive.fits import amount
    from olive.inventory import find
    from olive.lineage import describe

    item = find(cache, key)
    assert item.record is not None  # find() leaves out what has none
    seconds = item.record.get("seconds")
    took = f" in {seconds:.1f} s" if isinstance(seconds, float) else ""
    yield f"key                {item.key}"
    yield f"made               {_ago(item.made)}{took}, {amount(item.size)}, last used {_ago(item.used)}"
    yield from describe(item.record)


def _why_workflow(cache: Cache, file: Path, args: argparse.Namespace) -> Iterator[str]:
    from olive.cli.run import read_file
    from olive.inventory import items
    from olive.lineage import nearest
    from olive.plan import plan
    from olive.search.space import is_template
    from olive.workflow import read_workflow

    data: Any = read_file(str(file), args)
    if isinstance(data, dict):
        data.setdefault("output_dir", "output")
    if is_template(data):
        raise ConfigError(f"{file}: has holes, and each filling has keys of its own; give a workflow without holes")
    found = items(cache)
    for step in plan(read_workflow(data, str(file)), cache, overwrite=True).steps:
        yield f"{step.name} ({step.key[:12]}): {step.reason}"
        near = None if step.cached else nearest(step.parts, found)
        if near is not None:
            yield f"  against the nearest entry, {near[0].key[:12]} ({_ago(near[0].made)}):"
            yield from (f"  - {difference}" for difference in near[1])
            yield from (f"    {line}" for line in _input_files(step.origin, near[0]))
        elif not step.cached:
            yield f"  no entry of {step.name} to compare with"


def _input_files(origin: Any, item: Item) -> Iterator[str]:
    """Say which files of the input model differ from those that the entry was made from."""
    there = ((item.record or {}).get("origin") or {}).get("files")
    here = origin.get("files")
    if not here or not there:
        return
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"{name}: {'changed' if name in here and name in there else 'new' if name in here else 'gone'}"


def _gc(cache: Cache, args: argparse.Namespace) -> int:
    from olive.fits import amount
    from olive.inventory import collect, read_size

    done = collect(cache, read_size(args.max_size, "--max_size"))
    for item in done.removed:
        print(f"removed {item.key[:12]} {item.kind} {amount(item.size)}, last used {_ago(item.used)}")
    used = f", {done.in_use} in use stayed" if done.in_use else ""
    print(f"{len(done.removed)} removed, {amount(done.freed)} freed{used}; {amount(done.size)} left in {cache.root}")
    return 0


def _verify(cache: Cache, args: argparse.Namespace) -> int:
    from olive.inventory import damaged, items, repair

    found = damaged(cache)
    for item, wrong in found:
        print(f"{item.key[:12]} {item.kind}: {'; '.join(wrong)}")
    whole = sum(item.kind != "unfinished" for item in items(cache)) - len(found)
    if found and hasattr(args, "repair"):
        repair(cache, found)
        print(f"{whole} entries are as they were made, {len(found)} damaged ones removed")
        return 0
    if found:
        raise VerifyError(f"{len(found)} of {whole + len(found)} entries are damaged; remove them with --repair")
    print(f"{whole} entries, all as they were made")
    return 0
