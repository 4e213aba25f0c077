"""The logits of a checkpoint, one of its layers in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from olive.model import Model
from olive.runtime.layers import LayeredModel, open_tensors, skeleton


def checkpoint_logits(
    model: Model, ids: Tensor, device: str, change: Callable[[Any], Any] = lambda tensors: tensors
) -> Iterator[Tensor]:
    """Yield the float32 logits [1, T, V] of each row of ``ids`` [rows, T]; ``change`` may wrap the model's tensors."""
    meta = skeleton(model.path, trust_remote_code=model.trust_remote_code)
    tensors = change(open_tensors(model.path, meta, trust_remote_code=model.trust_remote_code))
    layered = LayeredModel(tensors, meta, dtype=torch.float32, devices=[device])
    batches = layered.start(ids, 1)
    for index, _, block in layered.layers():
        layered.advance(index, block, batches)
    for batch in batches:
        yield layered.logits(batch)
