"""A checkpoint with a LoRA adapter added into its weights, as the reference for a graph that keeps them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.decoder.peft import read_peft


class Merged:
    """Reads like the checkpoint under it; adapted weights come back as W + (A B)^T, float32."""

    def __init__(self, tensors: Any, adapter: Path) -> None:
        self.folder: Path = tensors.folder
        self._tensors, self._lora = tensors, read_peft(adapter)

    def weight(self, name: str) -> Tensor:
        """Return a tensor by its parameter name."""
        tensor = self._tensors.weight(name)
        found = self._lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if found is None:
            return tensor
        return tensor.float() + torch.from_numpy(found.a @ found.b).t()  # [K, R] x [R, N] -> [N, K]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors
