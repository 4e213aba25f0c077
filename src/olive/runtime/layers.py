"""A causal language model run one decoder layer at a time, its weights read from disk as they are needed.

Only the embeddings, the final norm and the output head stay in memory, plus one layer. The model's own forward code is
used for everything around the layers, so that any architecture that transformers loads runs unchanged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olive.errors import ConfigError
from olive.quant.formats.shards import Shards, ahead, find
from olive.runtime.experts import fused_experts, routers, unfuse


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
    device: str
    """Where the layers run on these rows."""

    def to(self, device: str) -> Batch:
        """Return the batch on another device."""
        if device == self.device:
            return self
        ids, hidden, arguments = _each((self.ids, self.hidden, self.arguments), lambda tensor: tensor.to(device))
        return Batch(ids, hidden, arguments, device)

    def halves(self) -> list[Batch]:
        """Split the rows in two."""
        rows = len(self.ids)

        def some(start: int, stop: int) -> Batch:
            def cut(tensor: Tensor) -> Tensor:
                return tensor[start:stop] if tensor.dim() and tensor.shape[0] == rows else tensor

            ids, hidden, arguments = _each((self.ids, self.hidden, self.arguments), cut)
            return Batch(ids, hidden, arguments, self.device)

        return [some(0, rows // 2), some(rows // 2, rows)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and dicts; the same tensor is changed once."""
    done: dict[int, Tensor] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in done:
                done[id(part)] = change(part)
            return done[id(part)]
        if isinstance(part, dict):
            return {key: walk(inner) for key, inner in part.items()}
        return type(part)(walk(inner) for inner in part) if isinstance(part, (tuple, list)) else part

    return walk(value)


Watch = Callable[[Batch, Tensor], None]


def _ignore(batch: Batch, out: Tensor) -> None:
    """Watch nothing."""


def auto_class(config: Any) -> Any:
    """Return the transformers class that loads a model with its language head and all its towers."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    # Some configurations serve a model that sees and its text half alike: the checkpoint says which of them it is.
    text_alone = any(name.endswith("ForCausalLM") for name in getattr(config, "architectures", None) or ())
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees and not text_alone else AutoModelForCausalLM


def unloadable(folder: Path, error: Exception) -> ConfigError:
    """Say why transformers refuses a model."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = "; if it comes with code of its own and you trust it, give trust_remote_code"
    return ConfigError(f"{folder}: transformers cannot load this model: {reason}{hint}")


def skeleton(folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Build the model without memory for its parameters (on the meta device), ready for weights.

    Fused experts become linear layers that are called what the checkpoint calls them.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds are computed, so kept real
            given = {"dtype": dtype} if dtype else {}
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **given)
    except (ValueError, KeyError, TypeError, OSError, ImportError, RuntimeError, StrictDataclassError) as error:
        raise unloadable(folder, error) from error
    unfuse_experts(model, folder)
    return model.eval()


def unfuse_experts(model: nn.Module, folder: Path) -> None:
    """Give a model's fused experts linears of their own, named as in the checkpoint of ``folder``."""
    if fused_experts(model):
        unfuse(model, Shards(find(folder)))


def decoder_layers(model: nn.Module, *, transposed: bool = False) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: in the text decoder, the longest list of alike modules that hold linear layers.

    A list inside such a list (experts) does not count, and a vision tower may have more layers than the decoder.
    ``transposed``: GPT-2's Conv1D are linear layers too. Such a model can be run, but not quantized.
    """
    from transformers.pytorch_utils import Conv1D

    linear = (nn.Linear, Conv1D) if transposed else nn.Linear
    whole: Any = model
    for within in (whole.get_decoder() if hasattr(whole, "get_decoder") else whole, whole):
        lists: dict[str, nn.ModuleList] = {}
        for name, module in within.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in lists):
                alike = len({type(layer) for layer in module}) == 1
                if alike and any(isinstance(part, linear) for part in module[0].modules()):
                    lists[name] = module
        if lists:
            longest = max(lists.values(), key=len)
            return next((name, longest) for name, module in model.named_modules() if module is longest)
    raise ConfigError(f"{type(model).__name__}: no list of decoder layers with Linear modules was found; those of "
                      "Conv1D (GPT-2) are rounded by olive auto-opt --precision int4 alone")  # fmt: skip


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every Linear inside the decoder layers, by its full name, but for those that choose experts."""
    prefix, layers = decoder_layers(model)
    fused = [f"{prefix}.{name}" for name in fused_experts(layers)]
    if fused:
        raise ConfigError(
            f"{type(model).__name__}: the experts of {fused[0]} ({type(model.get_submodule(fused[0])).__name__}) "
            "compute something else than down(act(gate x) * up x) without biases, and nothing else can be quantized; "
            "choose a model whose experts do that"
        )
    linears = {f"{prefix}.{name}": m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    kept = routers(model)
    return {name: m for name, m in linears.items() if name not in kept}


class _AllSeen(Exception):
    """Every layer has been reached."""


class LayeredModel:
    """Runs a causal language model layer by layer; see the module's docstring.

    Batches of rows are dealt out to ``devices``, each of which gets a copy of the layer at hand; what lies outside the
    layers is on the first.
    """

    def __init__(
        self, tensors: Tensors, model: Any, *, dtype: torch.dtype, devices: Sequence[str], transposed: bool = False
    ) -> None:
        """Fill ``model``, built by :func:`skeleton`, with what lies outside its layers."""
        self.tensors, self.model, self.dtype, self.devices = tensors, model, dtype, tuple(devices)
        self.device = self.devices[0]
        self.prefix, self.blocks = decoder_layers(self.model, transposed=transposed)
        self.offloaded = False
        """Rows that are not being computed wait in main memory."""
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
                buffer.data = buffer.data.to(self.device)

    def _read(self, name: str, *, to_device: bool = True) -> Tensor:
        if name not in self.tensors:
            raise ConfigError(f"{self.tensors.folder}: the model needs a tensor {name}, which no weights file holds")
        tensor = self.tensors.weight(name)
        tensor = tensor.to(self.device) if to_device else tensor
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def layers(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield (index, name, module) of each layer with its weights in memory; they are dropped afterwards. The next
        layer's are read meanwhile."""

        def read(index: int) -> dict[str, Tensor]:
            names = [n for n, _ in self.blocks[index].named_parameters()]
            return {n: self._read(f"{self.prefix}.{index}.{n}", to_device=False) for n in names}

        states = ahead(read(index) for index in range(len(self.blocks)))
        for (index, block), state in zip(enumerate(self.blocks), states, strict=True):
            block.load_state_dict({n: t.to(self.device) for n, t in state.items()}, strict=False, assign=True)
            block.to(self.device)
            block.requires_grad_(False)
            yield index, f"{self.prefix}.{index}", block
            block.load_state_dict({n: p.to("meta") for n, p in block.named_parameters()}, strict=False, assign=True)

    @torch.no_grad()
    def start(self, ids: Tensor, rows_per_batch: int) -> list[Batch]:
        """Embed ``ids`` [rows, T] and record what the model hands to each layer."""
        batches = []
        for number, part in enumerate(ids.split(rows_per_batch)):
            part = part.to(self.device)
            batch = self._embed(part) or self._embed(part, tuples=True)
            assert batch is not None
            batches.append(batch.to(self.devices[number % len(self.devices)]))
        return batches

    def _embed(self, ids: Tensor, *, tuples: bool | None = None) -> Batch | None:
        self._tuples = self._tuples if tuples is None else tuples
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        names = list(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]  # after self and hidden states

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, dict(zip(names, args, strict=False)) | kwargs))
            if len(seen) == len(self.blocks):
                raise _AllSeen  # what follows the layers is not wanted here
            return (hidden,) if self._tuples else hidden

        with suppress(_AllSeen):
            self._run(ids, record)
        shapes = {hidden.shape for hidden, _ in seen}
        if len(shapes) > 1:  # this model unpacks what a layer returns: layers return tuples
            return None
        return Batch(ids, seen[0][0], [kwargs for _, kwargs in seen], self.device)

    def _run(self, ids: Tensor, forward: Callable[..., Any]) -> Tensor:
        """Run the model's own forward with every layer's replaced by ``forward``; returns the logits."""
        for block in self.blocks:
            block.forward = forward
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward

    def apply(self, index: int, block: nn.Module, batch: Batch) -> Tensor:
        """Run one layer on a batch; returns its output [B, T, K] and leaves the batch as it is."""
        out = block(batch.hidden.to(batch.device), **batch.arguments[index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run_through(self, index: int, block: nn.Module, batches: list[Batch], watch: Watch = _ignore) -> None:
        """Run one layer on all batches, which stay as they are; ``watch`` is called with each and its output.

        Out of memory, a batch is halved; a single row that does not fit makes all rows wait in main memory.
        """
        copies = {device: copy.deepcopy(block).to(device) for device in self.devices[1:]}
        at = 0
        while at < len(batches):
            batch = batches[at]
            try:
                watch(batch, self.apply(index, copies.get(batch.device, block), batch))
                at += 1
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if len(batch.ids) > 1:
                    batches[at : at + 1] = batch.halves()
                elif not self.offloaded:
                    self.offloaded = True
                    for other in batches:
                        other.hidden = other.hidden.to("cpu")
                else:
                    raise

    def advance(self, index: int, block: nn.Module, batches: list[Batch], watch: Watch = _ignore) -> None:
        """Run one layer on all batches: their hidden states become its output."""

        def keep(batch: Batch, out: Tensor) -> None:
            watch(batch, out)
            batch.hidden = out.to("cpu") if self.offloaded else out

        self.run_through(index, block, batches, keep)

    def head_dim(self) -> int | None:
        """Size of one attention head, as far as the configuration tells."""
        config = self.model.config.get_text_config()
        heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        return getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Run what follows the layers on a batch's hidden states: logits [B, T, V]."""
        hidden = batch.hidden.to(self.device)
        return self._run(batch.ids.to(self.device), lambda *_, **__: (hidden,) if self._tuples else hidden)
