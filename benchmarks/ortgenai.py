"""ONNX Runtime's side of the inference benchmark: the process that measures in GenAI, bytes per token, the profile.

python benchmarks/ortgenai.py serve FOLDER --threads 2
python benchmarks/ortgenai.py profile FOLDER --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from turns import Request, serve

CONTEXT = 1024


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["serve", "profile"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.command == "serve":
        serve(lambda: load(args.source, args.threads))
    else:
        for phase in ("decode", "prefill"):
            profile(args.source, phase, args.threads).show()


def load(folder: Path, threads: int) -> Callable[[Request], dict[str, Any]]:
    """Load a GenAI folder; return the function that answers requests."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    settings = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
    model = og.Model(config)
    adapters = og.Adapters(model)

    def generate(ids: list[int], tokens: int, adapter: str | None = None) -> dict[str, Any]:
        params = og.GeneratorParams(model)
        # min_length keeps an end token, which random weights may choose, from ending the turn
        params.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        started = time.perf_counter()
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(ids)
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        decode = time.perf_counter() - read
        written = [int(i) for i in generator.get_sequence(0)[len(ids) :]]
        return {"prefill_s": read - started, "decode_s": decode, "tokens": written}

    def answer(request: Request) -> dict[str, Any]:
        kind = request.pop("kind")
        if kind == "generate":
            return generate(**request)
        for name, file in request["adapters"].items():
            if kind == "load":
                adapters.load(file, name)
            else:
                adapters.unload(name)
        return {}

    return answer


def folder_bytes(folder: Path) -> int:
    """Size of the graph and its weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def streamed_bytes(folder: Path) -> int:
    """Bytes of weights that one token reads.

    ONNX Runtime packs MatMulNBits to codes with two float32 numbers a group, its scale and the sum of its weights.
    """
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {i.name: math.prod(i.dims) * onnx.helper.tensor_dtype_to_np_dtype(i.data_type).itemsize
              for i in graph.initializer}  # fmt: skip
    total = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            has = {a.name: a.i for a in node.attribute}
            groups = -(-has["K"] // has["block_size"])
            total += has["N"] * groups * (has["block_size"] * has["bits"] // 8 + 8)
        elif node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
            total += sum(stored.get(name, 0) for name in node.input)
    return total


@dataclass(frozen=True)
class Profile:
    """Where the time of a run went, in milliseconds a run."""

    title: str
    runs: int
    run_ms: float
    """The whole run, with what lies between the kernels."""
    by_node: dict[tuple[str, str], float]
    """Of each node, by operator and name."""

    def show(self) -> None:
        """Print a table by operator; products with integer weights also by their place in a layer."""
        rows: dict[str, float] = defaultdict(float)
        for (kind, name), ms in self.by_node.items():
            rows[kind] += ms
            if kind == "MatMulNBits":
                rows[f"– {_place(name)}"] += ms
        kernels = sum(self.by_node.values())
        print(f"\n{self.title}: {self.run_ms:.2f} ms a run, {kernels:.2f} in kernels; mean of {self.runs} runs\n")
        print("| operator | ms | share of kernels |\n|---|---|---|")
        ranked = sorted((item for item in rows.items() if item[0][0] != "–"), key=lambda item: -item[1])
        parts = sorted((item for item in rows.items() if item[0][0] == "–"), key=lambda item: -item[1])
        for kind, ms in ranked:
            for label, value in [(kind, ms), *(parts if kind == "MatMulNBits" else [])]:
                if value > kernels / 1000:
                    print(f"| {label} | {value:.2f} | {value / kernels:.1%} |")


def _place(name: str) -> str:
    """Return the part of a node's name that says which linear it is."""
    return next((p for p in name.replace("/", ".").split(".") if p.endswith("_proj") or p == "lm_head"), name)


def profile(folder: Path, phase: str, threads: int, prompt: int = 128, runs: int = 16) -> Profile:
    """Profile decode steps after a prompt, or prefills of 512 tokens, with one buffer for the cache, as in GenAI."""
    import onnxruntime as ort

    if phase == "prefill":
        prompt, runs = 0, 2
    length = 512 if phase == "prefill" else 1
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    step = _stepper(session, folder)
    start = 0
    for size in [prompt or length, *[length] * (runs + 1)]:  # the first two are to warm up
        start = 0 if phase == "prefill" else start
        step(size, start)
        start += size
    file = Path(session.end_profiling())
    events = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    wholes = [e for e in events if e["name"] == "model_run"][-runs:]
    since = wholes[0]["ts"]
    by_node: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= since:
            name = event["name"].removesuffix("_kernel_time")
            by_node[event["args"]["op_name"], name] += event["dur"] / 1000 / runs
    run_ms = sum(e["dur"] for e in wholes) / 1000 / runs
    return Profile(f"{folder.parent.name if folder.name == 'model' else folder.name}, {phase}", runs, run_ms, by_node)


def _stepper(session: Any, folder: Path) -> Callable[[int, int], None]:
    """Return a function that reads tokens at a position; their cache lies in one buffer a layer."""
    import onnxruntime as ort

    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    caches = {i.name: types[i.type] for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    shape = [1, decoder["num_key_value_heads"], CONTEXT, decoder["head_size"]]
    binding = session.io_binding()
    for name, dtype in caches.items():
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
    given = {i.name for i in session.get_inputs()}
    generator = np.random.default_rng(0)

    def step(size: int, start: int) -> None:
        feed = {
            "input_ids": generator.integers(8, 2000, (1, size)),
            "attention_mask": np.ones((1, start + size), np.int64),
            "position_ids": np.arange(start, start + size)[None],
        }
        for name in given & set(feed):
            binding.bind_cpu_input(name, feed[name].astype(np.int64))
        binding.bind_output("logits")  # anew: its shape changes
        session.run_with_iobinding(binding)

    return step


if __name__ == "__main__":
    main()
