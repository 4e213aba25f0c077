"""What an adapter's nodes cost beside the same decoder without them, in one session and on the same weights.

    python benchmarks/adapter_nodes.py FOLDER/adapted/model --loads 6 --tokens 400

FOLDER is one of adapters.py's. Two sessions of one graph differ by more than an adapter's unused nodes cost, for where
their weights lie. So the graph is put twice into an If, with and without the adapter's nodes; ONNX Runtime keeps
prepacked weights of equal content once, so both read the same memory. Tokens take turns: without the nodes, with them
and no adapter, with an adapter of --rank. Then the same tokens are profiled, which shows what the profiler adds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from olive.runtime import adapters

NODES = (".lora_A.Gemm", ".lora_B.Gemm")
LENGTH, PROMPT = 1024, 128
KINDS = {"without the nodes": (False, False), "no adapter": (True, False), "adapter": (True, True)}
"""Whether the nodes are there, and whether they have an adapter."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    shares: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        place = Path(folder)
        twice(args.model, place)
        for load in range(args.loads):
            seconds = measure(args, place, load)
            plain = seconds["without the nodes"]
            for kind in KINDS:
                shares[kind].append(statistics.median(a / b for a, b in zip(seconds[kind], plain, strict=True)) - 1)
            print(f"load {load + 1}: {statistics.median(plain) * 1e3:.2f} ms a token without the nodes; "
                  + ", ".join(f"{kind} {shares[kind][-1]:+.2%}" for kind in KINDS), flush=True)  # fmt: skip
        print(f"\nrank {args.rank}, {args.threads} threads, {time.strftime('%Y-%m-%d')}; added time a token, median of "
              f"loads [least, most]")  # fmt: skip
        active = [(1 + a) / (1 + b) - 1 for a, b in zip(shares["adapter"], shares["no adapter"], strict=True)]
        for kind, found in (shares | {"adapter beside no adapter": active}).items():
            print(f"{kind}: {statistics.median(found):+.2%} [{min(found):+.2%}, {max(found):+.2%}], that is "
                  f"{1 - 1 / (1 + statistics.median(found)):.2%} of the speed")  # fmt: skip
        profiled(args, place)


def twice(model: Path, out: Path) -> None:
    """Write the decoder into both branches of an If; the input ``nodes`` says which one runs."""
    proto = onnx.load(model / "model.onnx", load_external_data=False)
    graph = proto.graph
    flag = helper.make_tensor_value_info("nodes", TensorProto.BOOL, [])
    names = [value.name for value in graph.output]
    branches = {"then_branch": _branch(graph, "on", nodes=True), "else_branch": _branch(graph, "off", nodes=False)}
    choice = helper.make_node("If", ["nodes"], names, **branches)
    del graph.node[:]
    graph.node.append(choice)
    graph.input.append(flag)
    onnx.save(proto, out / "model.onnx")
    os.link(model / "model.onnx.data", out / "model.onnx.data")


def _branch(graph: onnx.GraphProto, tag: str, *, nodes: bool) -> onnx.GraphProto:
    """Copy the nodes under names of their own; without those of adapters, whose readers take what these add to."""
    made = {name for node in graph.node for name in node.output if name}
    instead: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.name.endswith(NODES) and not nodes:
            instead[node.output[0]] = node.input[2] if node.name.endswith(NODES[1]) else ""
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        kept.append(copy)

    def renamed(name: str) -> str:
        name = instead.get(name, name)
        return f"{tag}.{name}" if name in made else name

    for node in kept:
        node.name = f"{tag}.{node.name}"
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [f"{tag}.{name}" if name else "" for name in node.output]
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.output]
    for value in outputs:
        value.name = f"{tag}.{value.name}"
    return helper.make_graph(kept, tag, [], outputs)


def _session(args: Any, folder: Path, **settings: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = args.threads, 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Turns:
    """A sequence of tokens of one kind, with a cache of its own."""

    def __init__(self, session: onnxruntime.InferenceSession, rank: int, seed: int, *, nodes: bool, adapter: bool):
        self._session, self._binding = session, session.io_binding()
        self._rng, self._at, self._keep = np.random.default_rng(seed), 0, list[Any]()
        for own in session.get_inputs():
            if own.name.startswith("past_key_values."):
                shape = [1, own.shape[1], LENGTH, own.shape[3]]
                value = self._hold(np.zeros(shape, np.float32), own.name)
                self._binding.bind_ortvalue_output(own.name.replace("past_key_values", "present"), value)
        if adapter:
            for own in session.get_overridable_initializers():
                if own.name.endswith(adapters.SUFFIXES):
                    parts = 3 if ".qkv_proj." in own.name else 2 if ".gate_up_proj." in own.name else 1
                    shape = [size if isinstance(size, int) and size > 0 else rank * parts for size in own.shape]
                    self._hold(self._rng.standard_normal(shape, np.float32) / 64, own.name)
        self._binding.bind_cpu_input("nodes", np.array(nodes))

    def _hold(self, array: np.ndarray, name: str) -> onnxruntime.OrtValue:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._keep.append((array, value))
        self._binding.bind_ortvalue_input(name, value)
        return value

    def run(self, tokens: int = 1) -> float:
        """Read tokens; return the seconds that it took."""
        if self._at + tokens > LENGTH:
            self._at = PROMPT  # the cache behind it is written anew
        self._binding.bind_cpu_input("input_ids", self._rng.integers(16, 1000, (1, tokens)))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self._at + tokens), np.int64))
        self._binding.bind_output("logits")
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self._at += tokens
        return time.perf_counter() - started


def _kinds(session: onnxruntime.InferenceSession, rank: int) -> Iterator[tuple[str, Turns]]:
    for kind, (nodes, adapter) in KINDS.items():
        turns = Turns(session, rank, 0, nodes=nodes, adapter=adapter)
        turns.run(PROMPT)
        yield kind, turns


def measure(args: Any, folder: Path, load: int) -> dict[str, list[float]]:
    """Load the graph and return the seconds of each token, by kind."""
    kinds = dict(_kinds(_session(args, folder), args.rank))
    found: dict[str, list[float]] = defaultdict(list)
    chance = random.Random(load)
    for _ in range(args.tokens):
        for kind in chance.sample(list(kinds), len(kinds)):
            found[kind].append(kinds[kind].run())
    return found


def profiled(args: Any, folder: Path) -> None:
    """Print what the profiler says of the nodes while no adapter is active."""
    session = _session(args, folder, enable_profiling=True, profile_file_prefix=str(folder / "profile"))
    turns, count = dict(_kinds(session, args.rank))["no adapter"], 40
    spent = sum(turns.run() for _ in range(count))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    since = sorted(event["ts"] for event in events if event["name"] == "model_run")[-count]
    nodes = [event["dur"] for event in events if event["cat"] == "Node" and event["ts"] >= since
             and event["name"].endswith(tuple(f"{end}_kernel_time" for end in NODES))]  # fmt: skip
    print(f"profiled: {len(nodes) / count:.0f} nodes take {sum(nodes) / count / 1e3:.3f} of {spent / count * 1e3:.2f} "
          f"ms a token, {statistics.median(nodes):.1f} µs each")  # fmt: skip


if __name__ == "__main__":
    main()
