"""Quantized copies of the tiny checkpoints, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from olive.quant.affine import QuantizedWeight, round_to_nearest
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.writer import CheckpointWriter, choose_groups, quantization_config

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def quantize(
    source: Path,
    out: Path,
    method: str,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    other: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, QuantizedWeight]:
    """Write ``source`` with every linear of the layers rounded; return the integers by module.

    ``other`` gives bits and group size of modules that have their own, among them the two ends of the model.
    """
    out.mkdir()
    checkpoint, writer = Checkpoint(source), CheckpointWriter(source, out)
    settings = {
        n.removesuffix(".weight"): (bits, group_size) for n in checkpoint.float_names if n.endswith("_proj.weight")
    }
    settings |= other or {}
    groups, found = {}, {}
    for module, setting in settings.items():
        groups |= choose_groups({module: checkpoint.linear_shape(module)}, method, *setting)
    for name in checkpoint.float_names:
        module, weight = name.removesuffix(".weight"), checkpoint.weight(name)
        group = groups.get(module) if module != name else None
        if group is None:
            writer.tensor(name, weight)
        else:
            found[module] = round_to_nearest(weight, group.bits, group.group_size, symmetric=symmetric)
            writer.quantized(module, found[module], method)
    tied = bool(checkpoint.config["tie_word_embeddings"])
    own = quantization_config(method, bits, group_size, symmetric, groups, tied=tied)
    writer.close(checkpoint.config | {"quantization_config": own})
    return found


def dequantized(model: torch.nn.Module, found: Mapping[str, QuantizedWeight]) -> torch.nn.Module:
    """Put what the integers stand for into a model."""
    for module, weight in found.items():
        model.get_submodule(module).weight.data = weight.dequantize()  # type: ignore[union-attr]
    return model
