"""Write a quantized (or dequantized) checkpoint beside its source, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight, fitting_group
from olive.quant.formats import FORMATS, holds
from olive.quant.formats.checkpoint import Checkpoint
from olive.quant.formats.layout import Grouping, end_of
from olive.quant.formats.shards import INDEX, MAX_BYTES, ShardWriter

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data", ".h5", ".msgpack", ".ot")
NOT_COPIED = {"config.json", "quantize_config.json", "olive.json", INDEX, "pytorch_model.bin.index.json"}


def choose_groups(
    shapes: Mapping[str, tuple[int, int]], method: str, bits: int, group_size: int
) -> dict[str, Grouping | None]:
    """Choose a group size per module [N, K], which may be a linear of a layer, lm_head or the embeddings.

    Where the one asked for does not fit, the largest smaller power of two that does is taken; if there is none, the
    layout has one group size for all (AWQ) or does not hold such a module, it stays float (None). Raises ConfigError
    for bits that the layout does not hold.
    """
    layout = FORMATS[method]
    if not holds(method, bits):
        raise ConfigError(f"{method}: {bits} bits were asked for, it holds {', '.join(map(str, layout.BITS))}"
                          f"{_others(method, Grouping(bits, group_size))}")  # fmt: skip
    chosen: dict[str, Grouping | None] = {}
    for module, (n, k) in shapes.items():
        size = fitting_group(k, group_size) if layout.MIXED and group_size != -1 else group_size
        if layout.MIXED and size not in (None, -1) and not layout.fits(n, k, bits, size):  # not a power of two
            size = fitting_group(k, 1 << (size.bit_length() - 1))
        fits = size is not None and layout.fits(n, k, bits, size) and (end_of(module) in (None, *layout.ENDS))
        chosen[module] = Grouping(bits, k if size == -1 else size, size == -1) if fits and size is not None else None
    return chosen


class CheckpointWriter:
    """Collects tensors into ``out``; :meth:`close` adds config.json and the files that are not weights."""

    def __init__(self, source: Path, out: Path, tensors: int = 100, *, scratch: Path | None = None) -> None:
        """``tensors``: about how many will be written; ``scratch``: where they wait, so that a kill loses little."""
        self.source, self.out = source, out
        self.shards = ShardWriter(out, tensors, scratch=scratch)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Write a float tensor."""
        self.shards.add(name, tensor)

    def copy(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], rows: Iterable[Tensor]) -> None:
        """Write a float tensor that comes some rows at a time."""
        self.shards.begin(name, dtype, shape)
        for part in rows:
            self.shards.rows(part)

    def quantized(self, module: str, weight: QuantizedWeight, method: str) -> None:
        """Write the integers of a linear layer or a table in the layout ``method``."""
        for part, tensor in FORMATS[method].pack(weight).items():
            self.shards.add(f"{module}.{part}", tensor)

    def close(self, config: Mapping[str, Any]) -> None:
        """Finish the weights; write ``config`` and copy tokenizer, generation settings and the like."""
        self.shards.close()
        (self.out / "config.json").write_text(_as_text(config), encoding="utf-8")
        for path in _copied(self.source):
            shutil.copyfile(path, self.out / path.name)


def _copied(source: Path) -> Iterator[Path]:
    """Yield the files of a checkpoint that its quantized one has too."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in NOT_COPIED:
            yield path


def _as_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def checkpoint_bytes(source: Path, config: Mapping[str, Any], sizes: Sequence[int], tensors: int) -> int:
    """Return how large a checkpoint with tensors of these ``sizes`` will be, given what :class:`CheckpointWriter` is
    given; at most so large where the tensors fill several files."""
    header = 8 + ShardWriter.ENTRY * (tensors + 2)
    weights = sum(sizes)
    files = 1 if weights <= MAX_BYTES else -(-weights // (MAX_BYTES - max(sizes)))
    index = ShardWriter.ENTRY * len(sizes) if files > 1 else 0
    others = sum(path.stat().st_size for path in _copied(source)) + len(_as_text(config).encode())
    return weights + files * header + index + others


def quantization_config(
    method: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    modules: Mapping[str, Grouping | None],
    *,
    tied: bool = False,
) -> dict[str, Any]:
    """Return config.json's ``quantization_config`` for modules that are stored as in ``modules`` (None: float).

    Bits and group size of most of them are ``bits`` and ``group_size`` (-1: all input channels); they may differ by
    module where the layout holds that. ``tied``: lm_head is not stored, it is the embeddings. Raises ConfigError for
    what the layout does not hold.
    """
    for module, chosen in modules.items():
        reason = _refusal(method, module, chosen, bits, group_size) if chosen else None
        if chosen and reason:
            asked = f"{chosen.bits} bits in groups of {chosen.written_size}"
            raise ConfigError(f"{method}: {module}: asked for {asked}, but {reason}{_others(method, chosen, module)}")
    return FORMATS[method].settings(bits, group_size, symmetric, modules, tied=tied)


def _refusal(method: str, module: str, chosen: Grouping, bits: int, group_size: int) -> str | None:
    """Say why a layout does not hold a module stored as ``chosen`` beside others of ``bits`` and ``group_size``."""
    layout, end = FORMATS[method], end_of(module)
    if not holds(method, chosen.bits):
        return f"the layout holds {', '.join(map(str, layout.BITS))} bits"
    if end is not None and end not in layout.ENDS:
        return f"the layout does not hold {end}"
    if not layout.MIXED and (chosen.bits, chosen.written_size) != (bits, group_size):
        return f"the layout has one setting for all modules, {bits} bits in groups of {group_size}"
    return None


def _others(method: str, chosen: Grouping, module: str = "") -> str:
    """Name the layouts that could hold what ``method`` does not."""
    able = [m for m in FORMATS if m != method and not _refusal(m, module, chosen, chosen.bits, 0)]
    return f"; use {' or '.join(able)}" if able else "; no layout holds that"


def realised_bits(checkpoint: Checkpoint) -> dict[str, int]:
    """Read off a quantized checkpoint's files how many bits each weight really has: -1 where the codes take other
    room than config.json says."""
    assert checkpoint.layout is not None
    found = {}
    for module in checkpoint.quantized:
        n, k = checkpoint.linear_shape(module)
        bits = checkpoint.module_settings(module)["bits"]
        unused = checkpoint.tensors.nbytes(f"{module}.{checkpoint.layout.PARTS[0]}") * 8 - n * k * bits
        found[module] = bits if 0 <= unused < 32 * n else -1  # a row may end within a word
    return found
