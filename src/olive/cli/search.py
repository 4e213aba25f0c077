"""A workflow file with holes: search it, then run the best workflow found."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.cli.run import max_size, open_cache, save, say, show_progress, write_report
from olive.errors import OliveError

if TYPE_CHECKING:
    from olive.search.space import Space
    from olive.search.study import Found


def execute_template(data: dict[str, Any], args: argparse.Namespace) -> int:
    """Search a template, and run its best workflow to the output, with verification."""
    from olive.config import dump

    output, overwrite, most = Path(data["output_dir"]).expanduser(), hasattr(args, "overwrite"), max_size()
    if hasattr(args, "save_config_file"):
        save(dump(data), Path(args.save_config_file or f"{output}.yaml"), args)
    with open_cache(args, output) as cache:
        from olive.search.study import prepare, search

        if hasattr(args, "dry_run"):
            space, _, output = prepare(data, cache, overwrite=overwrite)
            for line in space_lines(space, output):
                print(line)
            return 0
        from olive.engine import run
        from olive.plan import plan
        from olive.report import Report
        from olive.workflow import read_workflow

        with show_progress() as progress, cache.using():
            found = search(data, cache, overwrite=overwrite, progress=progress)
            if found.best is None:
                report = Report(dict(data), str(output), trials=[trial.data() for trial in found.trials])
                raise OliveError(f"{nothing(found)}; the trials are in {write_report(report, output)}")
            planned = plan(read_workflow(found.workflow), cache, overwrite=overwrite)
            report = run(planned, cache, overwrite=overwrite, progress=progress)
        if most is not None:
            from olive.inventory import collect

            collect(cache, most)
    report.trials = [trial.data() for trial in found.trials]
    report.pareto, report.best = found.pareto, found.best
    report.command = getattr(args, "command_line", "")
    say(report, planned.output)
    print(f"{'search':<12} ended by {found.ended}")
    return 0


def nothing(found: Found) -> str:
    """Say why no trial can be the result."""
    complete = [trial for trial in found.trials if trial.state == "complete"]
    if complete:
        first = complete[0]
        return f"no trial meets the hard goals: of {len(complete)} complete ones, trial {first.number} {first.reason}"
    reasons = [trial.reason or "" for trial in found.trials]
    common = max(set(reasons), key=reasons.count)
    return f"no trial was completed: {reasons.count(common)} of {len(reasons)} failed with: {common}"


def space_lines(space: Space, output: Path) -> Iterator[str]:
    """Yield what would be searched."""
    from olive.search.space import Choice

    size = space.size()
    yield f"search     {'endlessly many' if size is None else size} combinations"
    for hole in space.holes:
        values = ", ".join(map(str, hole.values)) if isinstance(hole, Choice) else f"{hole.low:g} to {hole.high:g}"
        yield f"{'':<10} {hole.path}: {values}"
    yield f"output     {output}"
