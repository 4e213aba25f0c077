"""Our decoder, GenAI's model builder and llama.cpp on the same checkpoints: build, memory, size and speed on a CPU.

    python benchmarks/inference.py MODEL ... --work FOLDER --llamacpp_python PYTHON --olive_flags "--group_size 128"
    python benchmarks/inference.py MODEL ... --work FOLDER --llamacpp_python PYTHON --steps measure report --rounds 4
    python benchmarks/inference.py MODEL ... --work FOLDER --steps profile

MODEL is a folder with a float checkpoint (llama, qwen2 or phi3); quality is not measured, so random weights do. PYTHON
is the interpreter of an environment with llama-cpp-python, gguf and numpy. A C compiler (cc) is needed.

build: makes what is missing in FOLDER (delete a result to have it made again), each in a process of its own; notes
seconds and peak memory.
measure: in each round, one process a candidate, all loaded; every candidate reads 512 tokens, then writes tokens after
a prompt of 128, in an order that changes by the round; the memory's bandwidth is read in between. Greedy, room for 1024
tokens. Each round loads anew, because two processes of one model may differ in speed for as long as they live (their
pages lie elsewhere). Rounds are appended, so that a long measurement may be done in pieces.
report: medians and ratios of the same rounds over all rounds so far.
profile: the time of each kind of operator in our graph and in GenAI's.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import mmap
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ortgenai
from turns import Worker, median, order, paired

HERE = Path(__file__).parent
STEPS = ("build", "measure", "report", "profile")
LLAMA = ("q4_0", "q4_k_m")
PROMPT, PREFILL = 128, 512
BUILDER_BYTES = 4
"""Peak memory of GenAI's builder per byte of a 16-bit checkpoint, as measured on GenAI 0.18."""
READ = """
#include <stddef.h>
typedef unsigned long long wide __attribute__((vector_size(64)));
unsigned long long read_all(const wide *p, size_t n, int times) {
    wide a = {0}, b = {0}, c = {0}, d = {0};
    size_t q = n / 4;
    for (; times; times--) {
        for (size_t i = 0; i < q; i++) { a += p[i]; b += p[i + q]; c += p[i + 2 * q]; d += p[i + 3 * q]; }
        __asm__ volatile("" ::: "memory");
    }
    a = a + b + c + d;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}
"""


def main() -> None:
    """Do the steps for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--candidates", nargs="+", choices=["olive", "genai", *LLAMA],
                        default=["olive", "genai", *LLAMA])  # fmt: skip
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER", help="a further GenAI folder")
    parser.add_argument("--olive_flags", default="", help="further flags of auto-opt, as one word")
    parser.add_argument("--llamacpp_python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    for model in args.models:
        bench = Bench(model.resolve(), (args.work / model.resolve().name).resolve(), args)
        for step in STEPS:
            if step in args.steps:
                getattr(bench, step)()


@dataclass(frozen=True)
class Bench:
    """One checkpoint, and the folder with what was made of it."""

    model: Path
    folder: Path
    args: Any

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return json.loads((self.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def place(self, name: str) -> Path:
        """Return the folder or the file of a candidate."""
        further = dict(pair.split("=", 1) for pair in self.args.also)
        if name in further:
            return Path(further[name])
        return self.folder / {"olive": "olive/model", "genai": "genai"}.get(name, f"{name}.gguf")

    def ready(self) -> list[str]:
        """Return the candidates that have been built."""
        names = [*self.args.candidates, *(pair.split("=", 1)[0] for pair in self.args.also)]
        return [name for name in names if self.place(name).exists()]

    def build(self) -> None:
        """Build what is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.args.candidates:
            if self.place(name).exists():
                continue
            commands = self._commands(name)
            if not commands:
                continue
            print(f"-- {self.model.name}: building {name}", file=sys.stderr)
            runs = [_timed(command) for command in commands]
            shutil.rmtree(self.folder / "scratch", ignore_errors=True)
            for kind in ("rounds", "loads"):  # they are of what was there before
                (self.folder / f"{kind}.jsonl").unlink(missing_ok=True)
            fact = {"candidate": name, "seconds": [r[0] for r in runs], "peak": [r[1] for r in runs]}
            self._note("builds", fact | {"commands": [shlex.join(c) for c in commands]})
        (self.folder / "float.gguf").unlink(missing_ok=True)

    def _commands(self, name: str) -> list[list[str]]:
        if name == "olive":
            return [[sys.executable, "-m", "olive", "auto-opt", "-m", str(self.model), "-o", str(self.folder / "olive"),
                     "--precision", "int4", "--verify", "files", "--no_cache",
                     *shlex.split(self.args.olive_flags)]]  # fmt: skip
        if name == "genai":
            needed = BUILDER_BYTES * sum(f.stat().st_size for f in self.model.glob("*.safetensors"))
            if needed > _free_memory():
                print(f"-- {self.model.name}: no genai: its builder would need {needed / 1e9:.0f} GB, of which "
                      f"{_free_memory() / 1e9:.0f} are free", file=sys.stderr)  # fmt: skip
                return []
            return [[sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.model), "-o",
                     str(self.place(name)), "-p", "int4", "-e", "cpu", "-c", str(self.folder / "scratch")]]  # fmt: skip
        llama = [self.args.llamacpp_python, str(HERE / "llamacpp.py")]
        source = self.folder / "float.gguf"
        convert = [] if source.exists() else [[*llama, "convert", str(self.model), str(source)]]
        return [*convert, [*llama, "quantize", str(source), str(self.place(name)), name,
                           "--threads", str(self.args.threads)]]  # fmt: skip

    def measure(self) -> None:
        """Append rounds."""
        names, first = self.ready(), len({r["round"] for r in self._notes("rounds")})
        bandwidth = Bandwidth(self.args.threads)
        for turn in range(first, first + self.args.rounds):
            with ExitStack() as stack:
                workers = {name: stack.enter_context(Worker(self._serve(name))) for name in order(names, turn)}
                for worker in workers.values():
                    worker.ask("generate", ids=self._ids(turn, 16), tokens=2)  # to warm up
                for phase, size, tokens in (("prefill", PREFILL, 0), ("decode", PROMPT, self.args.tokens)):
                    for name in order([*names, "bandwidth"], turn):
                        fact = {"round": turn, "candidate": name, "phase": phase}
                        if name == "bandwidth":
                            self._note("rounds", fact | {"rate": bandwidth.read()})
                            continue
                        found = workers[name].ask("generate", ids=self._ids(turn, size), tokens=tokens)
                        rate = tokens / found["decode_s"] if tokens else size / found["prefill_s"]
                        held = {key: found[key] for key in ("peak", "anonymous")}
                        self._note("rounds", fact | {"rate": rate, "tokens": tokens} | held)
                for name, worker in workers.items():
                    self._note("loads", {"candidate": name, "idle_cpu": worker.idle_cpu} | worker.facts)
            idle = max(worker.idle_cpu for worker in workers.values())
            print(f"-- {self.model.name}: round {turn + 1}; while it waited, no candidate used more than {idle:.1%} of "
                  "a core", file=sys.stderr)  # fmt: skip

    def _serve(self, name: str) -> list[str]:
        python, script = (
            (self.args.llamacpp_python, "llamacpp.py") if name in LLAMA else (sys.executable, "ortgenai.py")
        )
        return [python, str(HERE / script), "serve", str(self.place(name)), "--threads", str(self.args.threads)]

    def _ids(self, turn: int, size: int) -> list[int]:
        return random.Random(turn).choices(range(16, self.vocab), k=size)

    def report(self) -> None:
        """Print tables over all rounds so far."""
        names, rounds = self.ready(), self._notes("rounds")
        names = [name for name in names if any(r["candidate"] == name for r in rounds)]
        count = len({r["round"] for r in rounds})
        print(f"\n### {self.model.name}, {self.args.threads} threads, {count} rounds, {time.strftime('%Y-%m-%d')}")
        print(f"\n{_machine()}\n")
        self._report_sizes(names)
        self._report_speed(names, rounds)

    def _report_sizes(self, names: Sequence[str]) -> None:
        builds, rounds = {b["candidate"]: b for b in self._notes("builds")}, self._notes("rounds")
        print("| | build s | build peak MB | MB on disk | load s | peak MB loading, running | not mapped | bare |")
        print("|---|---|---|---|---|---|---|---|")
        for name in names:
            loads = [found for found in self._notes("loads") if found["candidate"] == name]
            turns = [found for found in rounds if found["candidate"] == name]
            built = ["–", "–"]
            if name in builds:
                seconds, peaks = builds[name]["seconds"], builds[name]["peak"]
                built = [" + ".join(f"{s:.0f}" for s in seconds), f"{max(peaks) / 1e6:.0f}"]
            peaks = [max(found[key] for found in group) / 1e6 for group, key in
                     ((loads, "peak"), (turns, "peak"), (turns, "anonymous"), (loads, "bare"))]  # fmt: skip
            print(f"| {name} | {' | '.join(built)} | {self._size(name) / 1e6:.0f} "
                  f"| {statistics.median(found['load_s'] for found in loads):.2f} "
                  f"| {peaks[0]:.0f}, {peaks[1]:.0f} | {peaks[2]:.0f} | {peaks[3]:.0f} |")  # fmt: skip

    def _report_speed(self, names: Sequence[str], rounds: Sequence[dict[str, Any]]) -> None:
        def rates(name: str, phase: str) -> list[float]:
            return [r["rate"] for r in rounds if r["candidate"] == name and r["phase"] == phase]

        bandwidth = rates("bandwidth", "decode")
        print(f"\nRead bandwidth in the same rounds: {median(bandwidth)} GB/s, median (best)\n")
        print("| | prefill tokens/s | decode tokens/s | MB a token | GB/s | share of the bandwidth |")
        print("|---|---|---|---|---|---|")
        for name in names:
            read, written, size = rates(name, "prefill"), rates(name, "decode"), self._streamed(name)
            moved = [rate * size / 1e9 for rate in written]
            print(f"| {name} | {median(read)} | {median(written)} | {size / 1e6:.0f} | {median(moved)} "
                  f"| {paired(moved, bandwidth)} |")  # fmt: skip
        ours = [name for name in names if name not in ("genai", *LLAMA)]
        print("\n| median ratio [quartiles] of the same rounds | prefill | decode |\n|---|---|---|")
        for name in ours:
            for other in names:
                if other != name:
                    ratios = [paired(rates(name, phase), rates(other, phase)) for phase in ("prefill", "decode")]
                    print(f"| {name} / {other} | {' | '.join(ratios)} |")

    def _size(self, name: str) -> int:
        place = self.place(name)
        return place.stat().st_size if name in LLAMA else ortgenai.folder_bytes(place)

    def _streamed(self, name: str) -> int:
        if name not in LLAMA:
            return ortgenai.streamed_bytes(self.place(name))
        command = [self.args.llamacpp_python, str(HERE / "llamacpp.py"), "bytes", str(self.place(name))]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def profile(self) -> None:
        """Print where the time goes, of each ONNX graph in a process of its own."""
        for name in self.ready():
            if name not in LLAMA:
                print(f"\n### {self.model.name}: {name}", flush=True)
                subprocess.run([sys.executable, str(HERE / "ortgenai.py"), "profile", str(self.place(name)),
                                "--threads", str(self.args.threads)], check=True)  # fmt: skip

    def _note(self, kind: str, fact: dict[str, Any]) -> None:
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")

    def _notes(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / f"{kind}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Bandwidth:
    """Reads a buffer that no cache holds, with several threads, four streams each, in huge pages if there are any."""

    SIZE, SWEEPS = 512 * 2**20, 8

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = mmap.mmap(-1, self.SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        ctypes.memset(self._start, 1, self.SIZE)
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "read.c", Path(folder) / "read.so"
            source.write_text(READ, encoding="utf-8")
            subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
            self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def read(self, times: int = 4) -> float:
        """Return the best of several readings in GB/s; each is long enough for every thread to find its core."""
        share = self.SIZE // self._threads
        best = 0.0
        for _ in range(times):
            starts = [self._start + i * share for i in range(self._threads)]
            threads = [threading.Thread(target=self._read, args=(start, share // 64, self.SWEEPS)) for start in starts]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = max(best, self.SWEEPS * self.SIZE / (time.perf_counter() - started) / 1e9)
        return best


def _timed(command: Sequence[str]) -> tuple[float, int]:
    """Run a program; return its seconds and the peak of its memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _machine() -> str:
    cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
               if line.startswith("model name"))  # fmt: skip
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "onnxruntime-genai")]
    return f"{os.cpu_count()} cores of {cpu}, {platform.system()}; {', '.join(versions)}"


if __name__ == "__main__":
    main()
