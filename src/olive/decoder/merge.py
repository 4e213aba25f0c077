"""A checkpoint with a LoRA adapter added into its weights, as the reference for a graph that keeps them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.decoder import families, lora
from olive.decoder.peft import read_peft
from olive.decoder.source import Source, own_name
from olive.quant.formats.checkpoint import Checkpoint


class Merged:
    """Reads like the checkpoint under it; adapted weights come back as W + (A B)^T, float32."""

    def __init__(self, tensors: Any, adapter: Path) -> None:
        self.folder: Path = tensors.folder
        self._tensors = tensors
        checkpoint = Checkpoint(self.folder)
        self._arch = families.read(checkpoint.config)
        places = lora.layout(self._arch, Source(checkpoint, self._arch), stored=True)
        self._lora = lora.placed(read_peft(adapter, places.layers), places, str(adapter))

    def weight(self, name: str) -> Tensor:
        """Return a tensor by its parameter name."""
        tensor = self._tensors.weight(name)
        module, _, kind = own_name(name, self._arch).rpartition(".")
        if kind != "weight" or module not in self._lora:
            return tensor
        update = torch.from_numpy(self._lora[module].a @ self._lora[module].b)  # [K, R] x [R, N]
        return tensor.float() + (update if self._arch.transposed else update.t())  # [K, N] or [N, K]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors
