"""What LoRA adapters cost at run time: speed with one of rank 16 on every linear, and a hundred on one base.

    python benchmarks/adapters.py MODEL --work FOLDER --olive_flags "--group_size 128"
    python benchmarks/adapters.py MODEL --work FOLDER --steps cost --rounds 4

MODEL is a folder with a float checkpoint; the adapters are random.

build: makes what is missing in FOLDER: a graph without and one with adapter inputs, and the adapters.
cost: decode and prefill of the graph without inputs (in two processes, to see the noise), of the other one without and
with an adapter, interleaved in an order that changes. adapter_nodes.py compares without that noise.
many: loads all adapters on one base, takes another one for each request, and compares every answer with that of the
adapter loaded alone; prints the memory.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from turns import Worker, median, order, paired

from olive.decoder import lora

STEPS = ("build", "cost", "many")
PROMPT, PREFILL = 128, 512
PROCESSES = ("plain", "plain again", "adapted")
KINDS = {"plain": ("plain", None), "plain again": ("plain again", None), "unused": ("adapted", None),
         "active": ("adapted", "000")}  # fmt: skip
"""What is compared: process and adapter."""


def main() -> None:
    """Do the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--olive_flags", default="", help="further flags of auto-opt, as one word")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    bench = Bench(args.model.resolve(), args.work.resolve(), args)
    for step in STEPS:
        if step in args.steps:
            getattr(bench, step)()


@dataclass(frozen=True)
class Bench:
    """One checkpoint, and the folder with what was made of it."""

    model: Path
    folder: Path
    args: Any

    def file(self, number: int) -> Path:
        """Return an adapter's file."""
        return self.folder / "adapters" / f"{number:03}.onnx_adapter"

    def build(self) -> None:
        """Build what is missing."""
        (self.folder / "adapters").mkdir(parents=True, exist_ok=True)
        linears = _linears(self.model)
        first = self.folder / "peft"
        if not first.exists():
            write_adapter(first, linears, self.args.rank, seed=0)
        for name, flags in (("plain", []), ("adapted", ["-a", str(first)])):
            if not (self.folder / name).exists():
                print(f"-- building {name}", file=sys.stderr)
                command = [sys.executable, "-m", "olive", "auto-opt", "-m", str(self.model), "-o",
                           str(self.folder / name), "--precision", "int4", "--verify", "files", "--no_cache", *flags,
                           *shlex.split(self.args.olive_flags)]  # fmt: skip
                subprocess.run(command, check=True, stdout=sys.stderr)
        for number in range(self.args.adapters):
            if not self.file(number).exists():
                peft = self.folder / "peft.new"
                shutil.rmtree(peft, ignore_errors=True)
                write_adapter(peft, linears, self.args.rank, seed=number)
                lora.convert(peft, self.folder / "adapted" / "model", self.file(number))
                shutil.rmtree(peft)

    def cost(self) -> None:
        """Measure and print what one adapter costs."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for turn in range(self.args.rounds):
            with ExitStack() as stack:
                # where the pages of a process lie changes its speed: each round loads anew
                workers = {p: stack.enter_context(self._worker(p.split()[0])) for p in order(PROCESSES, turn)}
                workers["adapted"].ask("load", adapters={"000": str(self.file(0))})
                for worker in workers.values():
                    worker.ask("generate", ids=self._ids(turn, 16), tokens=2)  # to warm up
                for phase, size, tokens in (("prefill", PREFILL, 0), ("decode", PROMPT, self.args.tokens)):
                    for kind in order(list(KINDS), turn):
                        process, adapter = KINDS[kind]
                        request = {"ids": self._ids(turn, size), "tokens": tokens, "adapter": adapter}
                        reply = workers[process].ask("generate", **request)
                        rate = tokens / reply["decode_s"] if tokens else size / reply["prefill_s"]
                        found[kind, phase].append(rate)
            print(f"-- round {turn + 1}", file=sys.stderr)
        print(f"\n### {self.model.name}, rank {self.args.rank} on every linear, {self.args.threads} threads, "
              f"{self.args.rounds} rounds, {time.strftime('%Y-%m-%d')}\n")  # fmt: skip
        print("| tokens/s, median (best); ratio [quartiles] | prefill | decode |\n|---|---|---|")
        phases = ("prefill", "decode")
        for kind in KINDS:
            print(f"| {kind} | {' | '.join(median(found[kind, phase]) for phase in phases)} |")
        for ours, theirs in (("active", "unused"), ("active", "plain"), ("unused", "plain"), ("plain again", "plain")):
            ratios = [paired(found[ours, phase], found[theirs, phase]) for phase in phases]
            print(f"| {ours} / {theirs} | {' | '.join(ratios)} |")

    def many(self) -> None:
        """Measure and print what many adapters on one base cost, and whether their answers are right."""
        names = {f"{number:03}": str(self.file(number)) for number in range(self.args.adapters)}
        request = {"ids": self._ids(0, 32), "tokens": 16}
        with self._worker("adapted") as worker:
            base = [worker.ask("generate", **request) for _ in range(4)][-1]  # the allocator has settled
            started = time.perf_counter()
            loaded = [worker.ask("load", adapters={name: file}) for name, file in names.items()][-1]
            load_s = time.perf_counter() - started
            mixed, peaks = {}, []
            for name in random.Random(0).sample(sorted(names), len(names)):
                mixed[name] = worker.ask("generate", adapter=name, **request)
                peaks.append(mixed[name]["peak"])
            end = worker.ask("generate", **request)
        alone = {}
        with self._worker("adapted") as worker:
            for name, file in names.items():
                worker.ask("load", adapters={name: file})
                alone[name] = worker.ask("generate", adapter=name, **request)
                worker.ask("unload", adapters={name: file})
        equal = sum(mixed[name]["tokens"] == alone[name]["tokens"] for name in names)
        distinct = {tuple(reply["tokens"]) for reply in [base, *mixed.values()]}
        files = sum(Path(file).stat().st_size for file in names.values())
        seconds = [
            statistics.median(r["prefill_s"] + r["decode_s"] for r in group.values()) for group in (mixed, alone)
        ]
        print(f"\n### {self.model.name}, {len(names)} adapters of rank {self.args.rank} on every linear\n")
        print(f"files {files / 1e6:.0f} MB, loaded in {load_s:.2f} s")
        print(f"memory held: base {base['held'] / 1e6:.0f} MB, with adapters loaded {loaded['held'] / 1e6:.0f}, after "
              f"a request for each {end['held'] / 1e6:.0f} (base + files: {(base['held'] + files) / 1e6:.0f}), peak "
              f"{max(peaks) / 1e6:.0f}; of it not mapped {base['anonymous'] / 1e6:.0f}, "
              f"{loaded['anonymous'] / 1e6:.0f}, {end['anonymous'] / 1e6:.0f}")  # fmt: skip
        print(f"answers equal to those of the adapter loaded alone: {equal} of {len(names)}; {len(distinct)} different "
              f"answers with the base's; base unchanged: {end['tokens'] == base['tokens']}")  # fmt: skip
        print(f"a request of 32 + 16 tokens, median: switching {seconds[0]:.3f} s, alone {seconds[1]:.3f} s")

    def _worker(self, name: str) -> Worker:
        script = Path(__file__).with_name("ortgenai.py")
        place = self.folder / name / "model"
        return Worker([sys.executable, str(script), "serve", str(place), "--threads", str(self.args.threads)])

    def _ids(self, turn: int, size: int) -> list[int]:
        vocab = json.loads((self.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        return random.Random(turn).choices(range(16, vocab), k=size)


def write_adapter(folder: Path, linears: dict[str, tuple[int, int]], rank: int, *, seed: int) -> None:
    """Write a random PEFT adapter; ``linears``: [N, K] of each adapted module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (n, k) in linears.items():
        name = f"base_model.model.{module}.lora_"
        tensors[f"{name}A.weight"] = torch.randn(rank, k, generator=generator) / k**0.5
        tensors[f"{name}B.weight"] = torch.randn(n, rank, generator=generator) / rank
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in linears})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _linears(model: Path) -> dict[str, tuple[int, int]]:
    """Return [N, K] of every linear in the layers of a checkpoint."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
                module, _, kind = name.rpartition(".")
                if module.endswith("_proj") and kind == "weight":
                    found[module] = tuple(tensors.get_slice(name).get_shape())
    return found


if __name__ == "__main__":
    main()
