"""Kill a run at random moments: neither the output nor the cache may ever be broken.

    python benchmarks/killed.py MODEL [TRIES, 50] [COMMAND OPTIONS ...]

Runs ``olive quantize`` (rtn, or the options given) in a fresh process group, kills it (SIGKILL) after a random time,
then checks: the output folder is absent, or whole with the digests of its manifest; ``olive cache verify`` finds every
entry as it was made. Half of the tries share one cache, from which ``olive cache gc`` removes all that is not in use
while the run goes on; the others begin with an empty cache. Every other try starts with an output already there, which
must stay or be replaced whole. In the end a run that is left alone must succeed and give the same bytes as one in a new
cache.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from olive.model import digests, read_manifest

ERRORS = Path(tempfile.gettempdir()) / f"olive-killed-{os.getpid()}.log"


def start(argv: list[str], cache: Path) -> subprocess.Popen:
    """Start an olive command in a process group of its own."""
    environment = os.environ | {"OLIVE_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    errors = ERRORS.open("w")  # of the command that was started last
    command = [sys.executable, "-m", "olive", *argv]
    return subprocess.Popen(command, env=environment, stdout=errors, stderr=errors, start_new_session=True)


def must(argv: list[str], cache: Path, what: str) -> None:
    """Run an olive command that has to succeed."""
    code = start(argv, cache).wait()
    assert code == 0, f"{what}: exit code {code}: {ERRORS.read_text()}"


def check(out: Path, cache: Path) -> str:
    """Fail if anything is broken; say what is there."""
    must(["cache", "verify"], cache, "olive cache verify")
    entries = len(list((cache / "entries").glob("*/*/step.json")))
    folders = len(list((cache / "entries").glob("*/*")))
    assert entries == folders, f"{folders - entries} entries without a record"
    if not out.exists():
        return f"no output, {entries} cache entries"
    manifest = read_manifest(out)
    assert manifest is not None, f"{out} has no manifest"
    assert manifest["files"] == digests(out), f"{out} is not what its manifest says"
    return f"whole output, {entries} cache entries"


def main() -> None:
    """Run all tries."""
    model, tries = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 50
    options = sys.argv[3:] or ["--algorithm", "rtn"]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="olive-killed-") as folder:
        out = Path(folder) / "out"
        argv = ["quantize", "-m", str(model), *options, "-o", str(out)]
        began = time.perf_counter()
        must(argv, Path(folder) / "whole", "the undisturbed run")
        whole, expected = time.perf_counter() - began, digests(out)
        print(f"an undisturbed run takes {whole:.1f} s")
        for number in range(tries):
            shared = number % 4 < 2
            cache = Path(folder) / ("cache" if shared else f"cache{number}")
            if number % 2 == 0:
                shutil.rmtree(out, ignore_errors=True)
            delay = draw.uniform(0.1, 1.05) * whole
            process = start(argv, cache)
            collector = start(["cache", "gc", "--max_size", "0"], cache) if shared else None
            try:
                process.wait(timeout=delay)
                ended = "ended by itself"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended = "killed"
            assert collector is None or collector.wait() == 0, "olive cache gc failed"
            print(f"{number + 1:>3}: {ended} after {delay:.1f} s: {check(out, cache)}", flush=True)
            began = time.perf_counter()
            must(argv, cache, "the next run")
            whole = time.perf_counter() - began  # what a run takes now: the machine may be busier than before
            check(out, cache)
            assert digests(out) == expected, "the next run gave other bytes"
            left = [p.name for p in Path(folder).iterdir() if p.name.startswith(".") and p.name.count("building")]
            assert not left, left
    ERRORS.unlink()
    print(f"{tries} tries, nothing broken")


if __name__ == "__main__":
    main()
