"""Experts on a CPU: one QMoE per layer, or MatMulNBits per expert.

    python benchmarks/experts.py --threads 2

Eight layers of eight experts, two of which each token takes: QMoE; the products of two fixed experts, the least that
MatMulNBits could do if it knew which; the products of all experts, which it has to do without control flow. 4 bits in
groups of 128, random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

LAYERS, EXPERTS, CHOSEN, HIDDEN, INNER, BLOCK = 8, 8, 2, 2048, 4096, 128


class Stack:
    """Layers of experts as one session."""

    def __init__(self, experts: int | None, threads: int) -> None:
        """``experts``: how many of each layer are computed by MatMulNBits; None: QMoE computes the chosen ones."""
        self.routed = experts is None
        self.rng = np.random.default_rng(0)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        x = "x"
        for layer in range(LAYERS):
            x = self._qmoe(x, layer) if experts is None else self._products(x, layer, experts)
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", HIDDEN])]
        if self.routed:
            inputs.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", EXPERTS]))
        outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "experts", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, tokens: int) -> float:
        """Return the seconds of one run."""
        feed = {"x": self.rng.standard_normal((1, tokens, HIDDEN), np.float32)}
        if self.routed:
            feed["scores"] = self.rng.standard_normal((tokens, EXPERTS), np.float32)
        began = time.perf_counter()
        self.session.run(None, feed)
        return time.perf_counter() - began

    def _weight(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Add codes [..., K / 2] and scales of random numbers; return their names."""
        codes = self.rng.integers(0, 256, shape, dtype=np.uint8)
        scale = self.rng.random((*shape[:-1], shape[-1] * 2 // BLOCK), dtype=np.float32) * 0.002
        self.weights += [numpy_helper.from_array(codes, name), numpy_helper.from_array(scale, f"{name}.scales")]
        return [name, f"{name}.scales"]

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        domain = "com.microsoft" if kind in ("QMoE", "MatMulNBits", "QuickGelu") else ""
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))

    def _qmoe(self, x: str, layer: int) -> str:
        first = self._weight(f"{layer}.gate_up", (EXPERTS, 2 * INNER, HIDDEN // 2))
        second = self._weight(f"{layer}.down", (EXPERTS, HIDDEN, INNER // 2))
        self._node("QMoE", [x, "scores", *first, "", *second], [f"{layer}.y"], k=CHOSEN, activation_type="swiglu",
                   swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1,
                   expert_weight_bits=4, block_size=BLOCK, accuracy_level=4)  # fmt: skip
        return f"{layer}.y"

    def _products(self, x: str, layer: int, experts: int) -> str:
        found = []
        for expert in range(experts):
            name = f"{layer}.{expert}"
            self._product(x, f"{name}.gate_up", 2 * INNER, HIDDEN)
            self._node("Split", [f"{name}.gate_up.y"], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
            self._node("QuickGelu", [f"{name}.gate"], [f"{name}.act"], alpha=1.0)
            self._node("Mul", [f"{name}.act", f"{name}.up"], [f"{name}.inner"])
            found.append(self._product(f"{name}.inner", f"{name}.down", HIDDEN, INNER))
        self._node("Sum", found, [f"{layer}.y"])
        return f"{layer}.y"

    def _product(self, x: str, name: str, n: int, k: int) -> str:
        codes, scales = self._weight(name, (n, k // 2))
        codes_3d = self.weights[-2]
        codes_3d.dims[:] = [n, k // BLOCK, BLOCK // 2]
        self._node("MatMulNBits", [x, codes, scales], [f"{name}.y"], N=n, K=k, bits=4, block_size=BLOCK,
                   accuracy_level=4)  # fmt: skip
        return f"{name}.y"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    kinds = {"QMoE": None, "two fixed experts": CHOSEN, "all experts": EXPERTS}
    stacks = {name: Stack(experts, args.threads) for name, experts in kinds.items()}
    for tokens in (1, 64):
        times: dict[str, list[float]] = {name: [] for name in stacks}
        for _ in range(args.rounds):
            for name, stack in stacks.items():
                stack.run(tokens)
                times[name].append(stack.run(tokens))
        shown = ", ".join(f"{name} {statistics.median(found) * 1e3:.1f} ms" for name, found in times.items())
        print(f"{tokens} tokens: {shown}")


if __name__ == "__main__":
    main()
