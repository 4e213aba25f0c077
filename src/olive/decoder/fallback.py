"""Families that are not built here: ONNX Runtime GenAI's own model builder, run as a program of its own."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from olive.decoder.families import FAMILIES
from olive.decoder.options import Options
from olive.errors import ConfigError, PassError
from olive.quant.formats.checkpoint import Checkpoint
from olive.resources import available_memory

log = logging.getLogger("olive")

BYTES_PER_PARAMETER = {"int4": 8, "int8": 8, "fp32": 4, "fp16": 4}
"""Measured peaks of the builder of GenAI 0.18 on Phi-3 shapes: 7.6 (int4), 3.4 (fp32)."""


def build(checkpoint: Checkpoint, out: Path, options: Options, scratch: Path) -> dict[str, Any]:
    """Build a float checkpoint with GenAI's builder; return the facts that are known of the result."""
    name = (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "")])[0]
    if checkpoint.quantized:
        raise _unsupported(name, "and GenAI's builder, the fallback, takes float checkpoints only")
    precision = ("fp16" if options.float16 else "fp32") if options.precision == "auto" else options.precision
    _check_memory(checkpoint, precision)
    log.warning("%s is not built by olive; using GenAI's model builder, whose weights are rounded its own way", name)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint.folder), "-o", str(out),
               "-p", precision, "-e", options.target.genai or "cpu", "-c", str(scratch)]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode or not (out / "model.onnx").is_file():
        reason = "\n".join(ended.stderr.strip().splitlines()[-4:])
        if "NotImplementedError" in reason or "does not recognize this architecture" in reason:
            raise _unsupported(name, f"and GenAI's builder, the fallback, says:\n{reason}")
        raise PassError(f"{checkpoint.folder}: GenAI's builder failed (exit code {ended.returncode}):\n{reason}")
    _check_bits(out / "model.onnx", precision, options.layer_bits)
    return {
        "engine": f"genai {importlib.metadata.version('onnxruntime-genai')}",
        "family": checkpoint.config.get("model_type", name),
        "bytes": sum(path.stat().st_size for path in out.glob("model.onnx*")),
        "adapted": [],
        "notes": [f"built by GenAI's model builder: {name} is not a family of olive"],
    }


def _check_bits(path: Path, precision: str, asked: int | None) -> None:
    """Check that the weights have the bits that were asked for."""
    import onnx

    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    found = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"}
    if (asked is None and found) or (asked is not None and min(found, default=0) != asked):
        raise PassError(f"{path}: asked GenAI's builder for {precision}, but its products have {sorted(found)} bits")


def _unsupported(name: str, reason: str) -> ConfigError:
    return ConfigError(f"architecture {name} is not supported; families: {', '.join(FAMILIES)}; {reason}")


def _check_memory(checkpoint: Checkpoint, precision: str) -> None:
    """Refuse a build that would not fit into the memory that is free now."""
    parameters = sum(math.prod(checkpoint.tensors.shape(name)) for name in checkpoint.float_names)
    needed = parameters * BYTES_PER_PARAMETER[precision]
    free = available_memory(swap=False)
    if needed > free:
        raise ConfigError(f"{checkpoint.folder}: GenAI's builder would need about {needed / 1e9:.1f} GB of memory, and "
                          f"{free / 1e9:.1f} GB are free; use a machine with more")  # fmt: skip
