"""The float weights of a checkpoint under the names that transformers' model has: streamed, or loaded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint, read_config
from olive.quant.formats.shards import find
from olive.runtime.experts import Experts
from olive.runtime.layers import Tensors, auto_class, unfuse_experts, unloadable
from olive.runtime.stored import under_model_names


class LoadedTensors:
    """The weights of a checkpoint that only transformers can read (renamed tensors, other files), all in memory."""

    def __init__(self, folder: Path, *, trust_remote_code: bool) -> None:
        from transformers import AutoConfig

        self.folder, self.config = folder, read_config(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model, info = auto_class(config).from_pretrained(
                folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise unloadable(folder, error) from error
        # transformers fills a missing tensor with random numbers and only warns.
        if info["missing_keys"]:
            raise ConfigError(f"{folder}: tensor {min(info['missing_keys'])} is missing; fetch the checkpoint again")
        unfuse_experts(model, folder)
        seen: set[int] = set()
        self._state = {}
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:  # a tied tensor counts once
                self._state[name] = tensor
            seen.add(tensor.data_ptr())
        self.float_names = list(self._state)

    def weight(self, name: str) -> Tensor:
        """Return a float tensor by its parameter name."""
        return self._state[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._state[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a float tensor."""
        return self._state[name][start:stop]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the checkpoint."""
        return self._state[name].dtype

    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(iter(self._state.values())).dtype

    def __contains__(self, name: str) -> bool:
        return name in self._state


def open_tensors(folder: Path, model: Any, *, trust_remote_code: bool = False) -> Checkpoint | LoadedTensors:
    """Open a checkpoint for streaming under the names of ``model``, built by :func:`skeleton`; where transformers has
    to compute some of its tensors, load it whole. The model is tied if the checkpoint is."""
    model.tie_weights()
    tensors = _open(folder, model, trust_remote_code=trust_remote_code)
    _untie(model, tensors)
    return tensors


def _untie(model: Any, tensors: Tensors) -> None:
    """A config may say tied over two tables that differ; then, as in transformers, they are not."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return
    names = [f"{name}.weight" for end in (head, table) for name, module in model.named_modules() if module is end]
    if all(name in tensors for name in names) and not torch.equal(*(tensors.weight(name) for name in names)):
        model.config.tie_word_embeddings = False
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def _open(folder: Path, model: Any, *, trust_remote_code: bool) -> Checkpoint | LoadedTensors:
    if find(folder):
        checkpoint = Checkpoint(folder)
        if checkpoint.method is not None and all(name in checkpoint for name, _ in model.named_parameters()):
            return checkpoint
        experts = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
        parts = dict(part for name, module in experts for part in module.parts(name))
        tensors = under_model_names(checkpoint.tensors, model, parts) if checkpoint.method is None else None
        if tensors is not None:
            checkpoint.tensors, checkpoint.float_names = tensors, list(tensors)
            return checkpoint
    return LoadedTensors(folder, trust_remote_code=trust_remote_code)
