"""The logits of a model on windows of tokens, one window at a time: of a checkpoint one layer in memory at a time, of
an ONNX graph in ONNX Runtime.

Shape letters: T tokens, V vocabulary, K channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.model import Model, files
from olive.runtime.layers import Batch, LayeredModel, skeleton
from olive.runtime.tensors import open_tensors


def logits(
    model: Model, adapter: Path | None, ids: Tensor, device: str, *, kept: Path | None = None
) -> Iterator[Tensor]:
    """Yield the float32 logits [1, T, V] of each row of ``ids`` [rows, T], with an adapter if one is given.

    ``kept`` is a folder for what is left to reuse of a checkpoint without adapter."""
    if model.kind == "onnx":
        return _onnx_logits(model, adapter, ids)
    if adapter is not None:
        return _adapted_logits(model, adapter, ids, device)
    return checkpoint_logits(model, ids, device, kept=kept)


def checkpoint_logits(
    model: Model,
    ids: Tensor,
    device: str,
    change: Callable[[Any], Any] = lambda tensors: tensors,
    *,
    kept: Path | None = None,
) -> Iterator[Tensor]:
    """Yield the float32 logits [1, T, V] of each row of ``ids`` [rows, T]; ``change`` may wrap the model's tensors.

    In ``kept``, a folder, the last hidden states [rows, T, K] stay for the next time: they are small, and only the head
    remains to be computed."""
    meta = skeleton(model.path, trust_remote_code=model.trust_remote_code)
    tensors = change(open_tensors(model.path, meta, trust_remote_code=model.trust_remote_code))
    layered = LayeredModel(tensors, meta, dtype=torch.float32, devices=[device], transposed=True)
    batches = layered.start(ids, 1)
    file = kept / f"hidden-{_digest(model, ids, device)}.safetensors" if kept is not None else None
    if file is not None and file.is_file():
        _restore(batches, file)
    else:
        for index, _, block in layered.layers():
            layered.advance(index, block, batches)
        if file is not None:
            _keep(batches, file)
    for batch in batches:
        yield layered.logits(batch)


def _digest(model: Model, ids: Tensor, device: str) -> str:
    """Digest what decides the hidden states. A model's files never change in place: name, size and time tell them."""
    folder = model.path.resolve()
    stats = [(name, (folder / name).stat()) for name in files(folder)]
    parts = [str(folder), device, *(f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ino}" for name, s in stats)]
    parts += [metadata.version(name) for name in ("torch", "transformers")]
    return hashlib.sha256("\n".join(parts).encode() + ids.numpy().tobytes()).hexdigest()


def _keep(batches: list[Batch], file: Path) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file({"hidden": torch.cat([batch.hidden.cpu() for batch in batches])}, building)
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)


def _restore(batches: list[Batch], file: Path) -> None:
    from safetensors.torch import load_file

    hidden = load_file(file)["hidden"]
    for row, batch in enumerate(batches):
        batch.hidden = hidden[row : row + 1].to(batch.device)


def _adapted_logits(model: Model, adapter: Path, ids: Tensor, device: str) -> Iterator[Tensor]:
    from olive.runtime.torch_model import load_adapted

    loaded = load_adapted(model.path, adapter, device=device, trust_remote_code=model.trust_remote_code)
    for row in ids:
        with torch.no_grad():
            yield loaded(input_ids=row[None].to(device), use_cache=False).logits


def _onnx_logits(model: Model, adapter: Path | None, ids: Tensor) -> Iterator[Tensor]:
    from olive.runtime.session import OnnxDecoder

    decoder = OnnxDecoder(model.path)
    for row in ids:
        yield torch.from_numpy(decoder.logits(row[None].numpy(), adapter)).float()
