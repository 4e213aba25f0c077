"""How many trials the samplers need to find what an exhaustive search finds.

    python benchmarks/search.py MODEL --text TEXT --study FOLDER [--seeds 10] [--trials 25]

The template below has three passes, two of them with holes. Every combination is made and measured once, by the grid
sampler; its study in FOLDER is the exhaustive table, and an interrupted run goes on. Then the samplers search with
each seed through the same code, with the table in place of the work. A trial hits if it is feasible and its size is
within 2 % of the smallest feasible size. The goal's threshold sets how hard that is, so several are tried: quantiles of
the table's KL divergences.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from olive.cache import Cache, default_root
from olive.search.journal import open_journal
from olive.search.space import STAND_IN, plain, read_space
from olive.search.study import Study, search
from olive.search.trial import Task, Trial
from olive.workflow import read_workflow

WITHIN = 1.02


def template(args: argparse.Namespace, goals: list[str], **options: Any) -> dict[str, Any]:
    """Return the workflow file with holes."""
    data = {"name": "text", "files": [args.text], "max_seq_len": 256, "max_samples": args.tokens // 256}
    return {
        "input_model": {"path": args.model},
        "passes": [
            {"type": "rotate"},
            {
                "type": {"choice": ["rtn", "kquant"]},
                "bits": {"choice": [3, 4, 8]},
                "group_size": {"choice": [32, 64, 128]},
            },
            {
                "type": "decoder",
                "lm_head": {"choice": ["float", "int8", "int4"]},
                "embeddings": {"choice": ["int8", "int4"]},
            },
        ],
        "evaluators": {"quality": {"type": "quality", "data": data}, "size": {"type": "size"}},
        "goals": goals,
        "search": options,
        "output_dir": str(Path(args.study) / "none"),
    }


class Table:
    """Trials that were done before, in place of workers."""

    count = 1

    def __init__(self, trials: list[Trial]) -> None:
        self._known = {plain(trial.values): trial for trial in trials}
        self._tasks: list[Task] = []

    def submit(self, task: Task) -> None:
        """Take a task."""
        self._tasks.append(task)

    def wait(self) -> list[Trial]:
        """Look the next task up."""
        task = self._tasks.pop(0)
        known = self._known[plain(task.values)]
        return [Trial(task.number, task.values, known.state, dict(known.metrics), seconds=known.seconds)]


def replay(args: argparse.Namespace, trials: list[Trial], sampler: str, seed: int, limit: float) -> list[Trial]:
    """Search with one seed over the table."""
    goals = [f"kl_divergence <= {limit}", "size_on_disk minimal"]
    data = template(args, goals, sampler=sampler, trials=args.trials) | {"seed": seed}
    head = read_workflow(data | {"passes": [STAND_IN]})
    with tempfile.TemporaryDirectory() as folder, open_journal(Path(folder), {}) as journal:
        cache = Cache(default_root())
        study = Study(data, read_space(data), head, cache, journal, Table(trials), lambda *_: None)
        return study.found(study.run()).trials


def hits(found: list[Trial], goal: float, limit: float) -> float:
    """Return the number of the first trial that hits, from 1; infinity if none does."""
    return next((i for i, trial in enumerate(found, 1) if good(trial, goal, limit)), math.inf)


def good(trial: Trial, goal: float, limit: float) -> bool:
    """Tell whether a trial is feasible and as small as wanted."""
    kl, size = trial.metrics["kl_divergence"], trial.metrics["size_on_disk"]
    return kl <= limit and size <= goal


def main() -> None:
    """Make the table, then replay the samplers on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--study", required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65, 0.8])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "gp", "random"])
    args = parser.parse_args()
    everything = template(args, ["kl_divergence minimal", "size_on_disk minimal"], sampler="grid", study=args.study)
    trials = search(everything, Cache(default_root()), progress=lambda *_: None).trials
    show(trials)
    kls = sorted(trial.metrics["kl_divergence"] for trial in trials if trial.state == "complete")
    print(
        f"\n| KL divergence at most | good | sampler | seeds that hit in {args.trials} | median trials | of each seed |"
    )
    print("|---|---|---|---|---|---|")
    for quantile in args.quantiles:
        limit = float(f"{kls[int(quantile * len(kls))]:.3g}")
        feasible = [t for t in trials if t.state == "complete" and t.metrics["kl_divergence"] <= limit]
        goal = WITHIN * min(t.metrics["size_on_disk"] for t in feasible)
        number = sum(good(t, goal, limit) for t in feasible)
        for sampler in args.samplers:
            needed = [hits(replay(args, trials, sampler, seed, limit), goal, limit) for seed in range(args.seeds)]
            within = f"{sum(n <= args.trials for n in needed)} of {args.seeds}"
            row = (
                f"| {limit:g} | {number} of {len(trials)} | {sampler} | {within} | "
                f"{statistics.median(needed):g} | {' '.join(f'{n:g}' for n in needed)} |"
            )
            print(row, flush=True)


def show(trials: list[Trial]) -> None:
    """Print the exhaustive table: KL divergence and megabytes, by quantizer and by the decoder's tables."""
    rows: dict[tuple[str, ...], dict[tuple[str, ...], Trial]] = {}
    for trial in trials:
        values = [str(value) for value in trial.values.values()]
        rows.setdefault(tuple(values[:3]), {})[tuple(values[3:])] = trial
    columns = list(next(iter(rows.values())))
    print(
        f"| quantizer, bits, group | {' | '.join(f'lm_head {head}, embeddings {table}' for head, table in columns)} |"
    )
    print("|" + "---|" * (len(columns) + 1))
    for quantizer, row in rows.items():
        print(f"| {' '.join(quantizer)} | {' | '.join(_cell(row[column]) for column in columns)} |")


def _cell(trial: Trial) -> str:
    if trial.state != "complete":
        return str(trial.reason)
    return f"{trial.metrics['kl_divergence']:.5f} ({trial.metrics['size_on_disk'] / 1e6:.2f} MB)"


if __name__ == "__main__":
    main()
