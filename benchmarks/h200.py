"""Quantize one model with ours and with llm-compressor, in turn, and print a JSON line for each run.

    python benchmarks/h200.py MODEL TEXT --out FOLDER [--algorithms rtn awq gptq] [--tools olive llmcompressor]

MODEL is a local folder, TEXT a plain text file for calibration; both tools get the same windows of it, cut by the
model's tokenizer. Weights become int4 in groups of 128, symmetric but for awq; the head stays float.

Each run is a process of its own. Its clock starts when torch, transformers and the tool are imported and the GPU is
woken, and stops when the last file is written: opening the model, tokenizing, compiling kernels and (ours) checking the
files count. The model's files are read once beforehand, so that nobody waits for the disk. Compiled kernels are kept on
disk between runs by Triton; with --repeats 2 the second run of each finds them.

llm-compressor imports `datasets` for types and for loading data by name, neither of which is used here. Where it is not
installed, empty classes stand in for it.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

BATCH_TOKENS = 16384
"""Tokens that llm-compressor runs at once: as many as ours on a GPU."""


class Job(NamedTuple):
    """What is done to what."""

    model: Path
    text: Path
    rows: int
    length: int
    algorithm: str
    output: Path

    def data(self) -> dict[str, Any]:
        """Return the calibration data as a workflow says it."""
        return {"name": "text", "files": [str(self.text)], "max_samples": self.rows, "max_seq_len": self.length}


def olive(job: Job) -> Callable[[], None]:
    """Import ours; return what quantizes."""
    import olive as package
    from olive.cache import Cache
    from olive.engine import run
    from olive.plan import plan
    from olive.workflow import read_workflow

    for found in pkgutil.walk_packages(package.__path__, "olive."):
        if found.name != "olive.__main__":
            try:
                import_module(found.name)
            except ModuleNotFoundError as error:  # ONNX tools are not needed here
                print(f"{found.name}: {error}", file=sys.stderr)
    step = {"type": job.algorithm, "group_size": 128, "symmetric": job.algorithm != "awq"}
    if job.algorithm != "rtn":
        step["data"] = job.data()
    data = {
        "input_model": {"path": str(job.model)},
        "passes": [step],
        "verify": {"level": "files"},
        "output_dir": str(job.output),
    }

    def quantize() -> None:
        cache = Cache(Path(tempfile.mkdtemp(prefix=".cache-", dir=job.output.parent)))
        run(plan(read_workflow(data), cache), cache)

    return quantize


def llmcompressor(job: Job) -> Callable[[], None]:
    """Import llm-compressor; return what quantizes."""
    if find_spec("datasets") is None:
        stand_in("datasets", "Dataset", "DatasetDict", "IterableDataset", "load_dataset")
        stand_in("datasets.formatting")
        stand_in("datasets.formatting.formatting", "LazyRow")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from olive.data.samples import windows
    from olive.data.spec import DataSpec

    kept: dict[str, Any] = {"targets": "Linear", "ignore": ["lm_head"]}
    recipe = {
        "rtn": lambda: [QuantizationModifier(scheme="W4A16", **kept)],
        "gptq": lambda: [GPTQModifier(scheme="W4A16", **kept)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **kept)],
    }[job.algorithm]

    def quantize() -> None:
        calibration: dict[str, Any] = {}
        if job.algorithm != "rtn":
            spec = DataSpec.model_validate(job.data())
            ids = windows(spec, AutoTokenizer.from_pretrained(job.model))
            batches = [{"input_ids": part} for part in ids.split(max(1, BATCH_TOKENS // job.length))]
            calibration = {
                "dataset": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
                "max_seq_length": job.length,
                "num_calibration_samples": len(ids),
            }
        oneshot(model=str(job.model), recipe=recipe(), output_dir=str(job.output), **calibration)

    return quantize


TOOLS: dict[str, Callable[[Job], Callable[[], None]]] = {"olive": olive, "llmcompressor": llmcompressor}


def stand_in(name: str, *classes: str) -> None:
    """Put an empty package with empty classes where an import looks for one."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for made in classes:
        setattr(module, made, type(made, (), {}))
    sys.modules[name] = module


def measure(tool: str, job: Job) -> dict[str, Any]:
    """Run one tool in this process, which must be new; return seconds, peak GPU memory and bytes written."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is for results
    import torch
    from accelerate import init_empty_weights  # noqa: F401  what either tool would import in any case
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

    quantize = TOOLS[tool](job)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    quantize()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "output_bytes": sum(path.stat().st_size for path in job.output.rglob("*") if path.is_file()),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }


def main() -> int:
    """Run every tool with every algorithm; return 1 if any run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--algorithms", nargs="+", choices=["rtn", "awq", "gptq"], default=["rtn", "awq", "gptq"])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--rows", type=int, default=128, help="Calibration windows.")
    parser.add_argument("--length", type=int, default=512, help="Tokens of each.")
    parser.add_argument("--repeats", type=int, default=1, help="Rounds over all tools.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the results; each replaces the last.")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    for path in filter(Path.is_file, args.model.iterdir()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    failed = False
    for algorithm in args.algorithms:
        for _ in range(args.repeats):
            for tool in args.tools:
                output = args.out.resolve() / f"{tool}-{algorithm}"
                shutil.rmtree(output, ignore_errors=True)
                job = Job(args.model.resolve(), args.text.resolve(), args.rows, args.length, algorithm, output)
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    try:
                        found = pool.submit(measure, tool, job).result()
                    except Exception as error:  # theirs may raise anything; the others still count
                        found, failed = {"error": f"{type(error).__name__}: {error}"}, True
                for cache in args.out.glob(".cache-*"):
                    shutil.rmtree(cache)
                line = {"tool": tool, "algorithm": algorithm, "rows": args.rows, "length": args.length}
                print(json.dumps(line | found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
