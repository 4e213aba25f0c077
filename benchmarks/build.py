"""Time and memory of building a graph, beside what reading, rounding and writing cost alone.

    python benchmarks/build.py MODEL --out FOLDER --flags "--precision int4"

Runs ``olive auto-opt MODEL --verify files --no_cache`` in a process of its own, watching its resident and its anonymous
memory (Linux), then measures three parts alone, with the same number of threads: reading the checkpoint's bytes,
rounding and packing its weights from memory (a sample, scaled up), writing as many bytes as the result has.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from olive.decoder import weights
from olive.quant.affine import round_to_nearest

SAMPLE = 1 << 26
"""Weights that are rounded to measure how fast that is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the result, replaced.")
    parser.add_argument("--flags", default="--precision int4", help="Further flags of auto-opt.")
    args = parser.parse_args()
    shards = sorted(args.model.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    command = [sys.executable, "-m", "olive", "auto-opt", "-m", str(args.model), "-o", str(args.out), "--overwrite",
               "--verify", "files", "--no_cache", *shlex.split(args.flags)]  # fmt: skip
    seconds, resident, anonymous = watched(command)
    made = sum(path.stat().st_size for path in (args.out / "model").iterdir())
    print(f"auto-opt: {seconds:.1f} s, peak RSS {resident:.2f} GB, peak anonymous {anonymous:.2f} GB, "
          f"{size / 1e9:.2f} GB -> {made / 1e9:.2f} GB")  # fmt: skip
    parts = {"read": reading(shards), "round and pack": rounding(size / 2), "write": writing(args.out.parent, made)}
    if os.access(args.out, os.W_OK):
        shutil.rmtree(args.out)
    alone = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
    print(f"alone: {alone}; together {sum(parts.values()):.1f} s, the build is {seconds / sum(parts.values()):.2f}x")


def watched(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return seconds, peak resident and peak anonymous memory in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for key in peaks:
            if found := re.search(rf"{key}:\s+(\d+)", status):
                peaks[key] = max(peaks[key], int(found[1]))
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"failed: {shlex.join(command)}")
    return time.perf_counter() - began, peaks["VmHWM"] / 1e6, peaks["RssAnon"] / 1e6


def reading(shards: list[Path]) -> float:
    """Seconds to read the files once, as they lie in the page cache or not now."""
    began, buffer = time.perf_counter(), bytearray(1 << 24)
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def rounding(count: float) -> float:
    """Seconds to round and pack ``count`` weights, on as many threads as the builder uses."""
    sample = torch.randn(SAMPLE // 4096, 4096).bfloat16()
    jobs = (lambda rows=rows: [weights.blocks(round_to_nearest(tile.float(), 4, 128, symmetric=False))
                               for tile in weights.row_tiles(rows)] for rows in sample.split(512))  # fmt: skip
    began = time.perf_counter()
    for _ in weights.in_order(jobs):
        pass
    return (time.perf_counter() - began) * count / SAMPLE


def writing(folder: Path, size: int) -> float:
    """Seconds to write ``size`` bytes."""
    place, block = folder / ".written", os.urandom(1 << 24)
    began = time.perf_counter()
    with place.open("wb") as file:
        for _ in range(size >> 24):
            file.write(block)
    seconds = time.perf_counter() - began
    place.unlink()
    return seconds


if __name__ == "__main__":
    main()
