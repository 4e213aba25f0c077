"""Keys and values cached as int8: scales from a short text, put into a graph that caches floats.

Shape letters: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from olive.data.rows import default_text
from olive.decoder.graph import MODEL
from olive.runtime.session import OnnxDecoder

WINDOWS, WINDOW_TOKENS = 8, 256
MARGIN = 1.1
"""Room above the largest value seen: what lies beyond is cut off."""
K_SCALE, INPUTS = 12, 14
"""Place of the keys' scales among the inputs of GroupQueryAttention, and how many there are up to the values'."""


def to_int8(folder: Path) -> None:
    """Make the cache of a built folder int8 with a scale per channel, in place."""
    scales = _scales(folder)
    model = ir.load(folder / MODEL)
    graph = model.graph
    for layer, node in enumerate(n for n in graph if n.op_type == "GroupQueryAttention"):
        inputs: list[ir.Value | None] = [*node.inputs, *[None] * (INPUTS - len(node.inputs))]
        for i, part in enumerate(("key", "value")):
            name = f"scale.{layer}.{part}"
            value = ir.Value(name=name, const_value=ir.tensor(scales[layer, part], name=name))
            graph.initializers.add(value)
            inputs[K_SCALE + i] = value
        node.resize_inputs(INPUTS)
        for i, found in enumerate(inputs):
            node.replace_input_with(i, found)
        for key in ("k_quant_type", "v_quant_type"):
            node.attributes[key] = ir.AttrString(key, "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    for value in (*graph.inputs, *graph.outputs):
        if value.name and value.name.startswith(("past_key_values.", "present.")):
            value.type = ir.TensorType(ir.DataType.INT8)
    ir.save(model, folder / MODEL)


def _scales(folder: Path) -> dict[tuple[int, str], np.ndarray]:
    """Return scales float32 [H * D] of each layer's keys and values, from the shipped calibration text."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(default_text(), add_special_tokens=False).ids
    decoder = OnnxDecoder(folder)
    length = min(WINDOW_TOKENS, decoder.context_length)
    largest: dict[tuple[int, str], np.ndarray] = {}
    for start in range(0, min(len(ids), WINDOWS * length), length):
        for name, value in decoder.run(np.array([ids[start : start + length]])).items():
            if name.startswith("present."):
                layer, part = int(name.split(".")[1]), name.split(".")[2]
                found = np.abs(value.astype(np.float32)).max((0, 2)).reshape(-1)  # [B, H, T, D] -> [H * D]
                largest[layer, part] = np.maximum(largest.get((layer, part), found), found)
    return {key: np.maximum(found * (MARGIN / 127), np.finfo(np.float32).tiny) for key, found in largest.items()}
