"""A causal language model run one decoder layer at a time, its weights read from disk as they are needed.

Only the embeddings, the final norm and the output head stay in memory, plus one layer. The model's own forward code is
used for everything around the layers, so that any architecture that transformers loads runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olive.errors import ConfigError
from olive.quant.formats.checkpoint import Checkpoint, read_config
from olive.quant.formats.shards import find


class Tensors(Protocol):
    """Where weights come from: a :class:`~olive.quant.formats.checkpoint.Checkpoint` or anything like it."""

    folder: Path

    def weight(self, name: str) -> Tensor:
        """Return a float tensor by its parameter name."""

    def __contains__(self, name: str) -> bool: ...


@dataclass
class Batch:
    """Rows on their way through the layers."""

    ids: Tensor
    """int64 [B, T]."""
    hidden: Tensor
    """[B, T, K], the input of the next layer."""
    arguments: list[dict[str, Any]]
    """Per layer, what the model passes to it besides the hidden states (masks, position embeddings)."""


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model without memory for its parameters (on the meta device), ready for weights."""
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, ImportError, StrictDataclassError) as error:
        raise ConfigError(f"{folder}: transformers cannot build this model: {str(error).splitlines()[0]}") from None
    return model.eval()


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: the longest list of alike modules that hold linear layers."""
    found: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        alike = len({type(layer) for layer in module}) == 1
        linear = any(isinstance(part, nn.Linear) for part in module[0].modules())
        if alike and linear and (found is None or len(module) > len(found[1])):
            found = (name, module)
    if found is None:
        raise ConfigError(f"{type(model).__name__}: no list of decoder layers with Linear modules was found")
    return found


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every Linear inside the decoder layers, by its full name."""
    prefix, layers = decoder_layers(model)
    return {f"{prefix}.{name}": m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}


class LoadedTensors:
    """The weights of a checkpoint that only transformers can read (renamed tensors, other files), all in memory."""

    def __init__(self, folder: Path, *, trust_remote_code: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.folder, self.config = folder, read_config(folder)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder}: transformers cannot load this model: {str(error).splitlines()[0]}") from None
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

    def stored_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the checkpoint."""
        return self._state[name].dtype

    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(iter(self._state.values())).dtype

    def __contains__(self, name: str) -> bool:
        return name in self._state


def open_tensors(folder: Path, model: Any, *, trust_remote_code: bool = False) -> Checkpoint | LoadedTensors:
    """Open a checkpoint for streaming; where its names are not those of the model's layers, load it whole."""
    if find(folder):
        checkpoint = Checkpoint(folder)
        model.tie_weights()
        if all(name in checkpoint for name, _ in model.named_parameters()):
            return checkpoint
    return LoadedTensors(folder, trust_remote_code=trust_remote_code)


class _AllSeen(Exception):
    """Every layer has been reached."""


class LayeredModel:
    """Runs a causal language model layer by layer; see the module's docstring."""

    def __init__(self, tensors: Tensors, model: Any, *, dtype: torch.dtype, device: str) -> None:
        """Fill ``model``, built by :func:`skeleton`, with what lies outside its layers."""
        self.tensors, self.model, self.dtype, self.device = tensors, model, dtype, device
        self.prefix, self.blocks = decoder_layers(self.model)
        self._tuples = False
        inside = self.prefix + "."
        self.model.tie_weights()
        outside = {n: self._read(n) for n, _ in self.model.named_parameters() if not n.startswith(inside)}
        self.model.load_state_dict(outside, strict=False, assign=True)
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            if name in tensors:
                buffer.data = tensors.weight(name).to(buffer.dtype)
            if not name.startswith(inside):
                buffer.data = buffer.data.to(device)

    def _read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ConfigError(f"{self.tensors.folder}: the model needs a tensor {name}, which no weights file holds")
        tensor = self.tensors.weight(name)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def layers(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield (index, name, module) of each layer with its weights in memory; they are dropped afterwards."""
        for index, block in enumerate(self.blocks):
            name = f"{self.prefix}.{index}"
            names = [n for n, _ in block.named_parameters()]
            block.load_state_dict({n: self._read(f"{name}.{n}") for n in names}, strict=False, assign=True)
            block.to(self.device)
            block.requires_grad_(False)
            yield index, name, block
            block.load_state_dict({n: p.to("meta") for n, p in block.named_parameters()}, strict=False, assign=True)

    @torch.no_grad()
    def start(self, ids: Tensor, rows_per_batch: int) -> list[Batch]:
        """Embed ``ids`` [rows, T] and record what the model hands to each layer."""
        batches = []
        for part in ids.split(rows_per_batch):
            part = part.to(self.device)
            batches.append(self._embed(part) or self._embed(part, tuples=True))
        return [batch for batch in batches if batch is not None]

    def _embed(self, ids: Tensor, *, tuples: bool | None = None) -> Batch | None:
        self._tuples = self._tuples if tuples is None else tuples
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise ConfigError(f"{type(self.model).__name__}: passes positional arguments to its layers")
            seen.append((hidden, kwargs))
            if len(seen) == len(self.blocks):
                raise _AllSeen  # what follows the layers is not wanted here
            return (hidden,) if self._tuples else hidden

        with suppress(_AllSeen):
            self._run(ids, record)
        shapes = {hidden.shape for hidden, _ in seen}
        if len(shapes) > 1:  # this model unpacks what a layer returns: layers return tuples
            return None
        return Batch(ids, seen[0][0], [kwargs for _, kwargs in seen])

    def _run(self, ids: Tensor, forward: Callable[..., Any]) -> Tensor:
        """Run the model's own forward with every layer's replaced by ``forward``; returns the logits."""
        for block in self.blocks:
            block.forward = forward
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward

    @torch.no_grad()
    def apply(self, index: int, block: nn.Module, batch: Batch) -> Tensor:
        """Run one layer on a batch; returns its output [B, T, K] and leaves the batch as it is."""
        out = block(batch.hidden, **batch.arguments[index])
        return out[0] if isinstance(out, tuple) else out

    def run_through(self, index: int, block: nn.Module, batches: list[Batch]) -> None:
        """Run one layer on all batches, for those who watch; the batches stay as they are."""
        for batch in batches:
            self.apply(index, block, batch)

    def advance(self, index: int, block: nn.Module, batches: list[Batch]) -> None:
        """Run one layer on all batches: their hidden states become its output."""
        for batch in batches:
            batch.hidden = self.apply(index, block, batch)

    def head_dim(self) -> int | None:
        """Size of one attention head, as far as the configuration tells."""
        config = self.model.config
        heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        return getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Run what follows the layers on a batch's hidden states: logits [B, T, V]."""
        return self._run(batch.ids, lambda *_, **__: (batch.hidden,) if self._tuples else batch.hidden)
