"""What the searches need to know about the inputs of a layer's linears, gathered once and, if asked, kept on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.formats.shards import Shards, ShardWriter, find

INDEX = "statistics.json"
ROWS = 1 << 16
"""Tokens whose float32 copy is made at once."""


class InputStatistics:
    """Sums over the tokens of one input tensor with K channels; each device adds to sums of its own."""

    def __init__(self, k: int, device: str | torch.device) -> None:
        """Start with no tokens."""
        self.k, self.device = k, torch.device(device)
        self.tokens = 0
        self._sums: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._done: tuple[Tensor, Tensor, Tensor] | None = None
        self._cross: dict[torch.device, Tensor] = {}
        self._compared = 0

    def add(self, x: Tensor) -> None:
        """Count the rows of ``x`` [..., K]."""
        x = x.reshape(-1, self.k)  # [B, T, K] -> [B * T, K]
        if x.device not in self._sums:
            zeros = torch.zeros(self.k, device=x.device)
            self._sums[x.device] = (torch.zeros(self.k, self.k, device=x.device), zeros, zeros.clone())
        gram, absolute, largest = self._sums[x.device]
        for rows in x.split(ROWS):
            rows = rows.float()
            gram.addmm_(rows.t(), rows)
            size = rows.abs()
            absolute += size.sum(0)
            torch.maximum(largest, size.amax(0), out=largest)
        self.tokens += len(x)

    def compare(self, x: Tensor, expected: Tensor) -> None:
        """Count what the rows of ``x`` [..., K] lack of ``expected``, the float model's; :meth:`add` counts them."""
        x, expected = x.reshape(-1, self.k), expected.reshape(-1, self.k)  # [B, T, K] -> [B * T, K]
        if x.device not in self._cross:
            self._cross[x.device] = torch.zeros(self.k, self.k, device=x.device)
        for rows, wanted in zip(x.split(ROWS), expected.split(ROWS), strict=True):
            rows = rows.float()
            self._cross[x.device].addmm_((wanted.float() - rows).t(), rows)
        self._compared += len(x)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of x x^T (float32 [K, K], exactly symmetric), that of abs(x) and the largest abs(x) [K]."""
        if self._done is None:
            gram = torch.zeros(self.k, self.k, device=self.device)
            absolute, largest = torch.zeros(self.k, device=self.device), torch.zeros(self.k, device=self.device)
            for device in sorted(self._sums, key=str):
                one = self._sums[device]
                gram += one[0].to(self.device)
                absolute += one[1].to(self.device)
                largest = torch.maximum(largest, one[2].to(self.device))
            self._sums = {}
            upper = torch.triu(gram)
            self._done = (upper + torch.triu(gram, 1).t(), absolute, largest)
        return self._done

    def rescale(self, scale: Tensor) -> None:
        """Account for channels divided by ``scale`` [K]."""
        gram, absolute, largest = self.sums()
        self._done = (gram / (scale[:, None] * scale[None, :]), absolute / scale, largest / scale)

    def mean_gram(self) -> Tensor:
        """Return G = X^T X / T, float32 [K, K]."""
        return self.sums()[0] / max(self.tokens, 1)

    def mean_cross(self) -> Tensor | None:
        """Return the mean of (x' - x) x^T with x' the float model's input, float32 [K, K]; None unless every token was
        compared."""
        if not self._cross or self._compared != self.tokens:
            return None
        total = torch.zeros(self.k, self.k, device=self.device)
        for device in sorted(self._cross, key=str):
            total += self._cross[device].to(self.device)
        return total / self.tokens

    def mean_absolute(self) -> Tensor:
        """Return the mean of abs(x) per channel, [K]."""
        return self.sums()[1] / max(self.tokens, 1)

    def largest(self) -> Tensor:
        """Return the largest abs(x) per channel, [K]."""
        return self.sums()[2]


class SavedStatistics:
    """Statistics of a float model's inputs in a folder; made by :class:`StatisticsWriter`.

    ``identity`` tells model, tokens and arithmetic: what was gathered from others is refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        index = read_index(folder)
        differing = sorted(name for name, value in identity.items() if index["identity"].get(name) != value)
        if differing:
            raise ConfigError(
                f"statistics {folder}: gathered with another {' and '.join(differing)}; give the same model, data and "
                "device, or gather them anew with --save_statistics"
            )
        self._tokens: dict[str, int] = index["tokens"]
        self._tensors = Shards(find(folder))
        lacking = [name for name in ("ids", *(f"{n}.gram" for n in self._tokens)) if name not in self._tensors]
        if lacking:
            raise ConfigError(f"statistics {folder}: lacks {lacking[0]}; gather them anew with --save_statistics")
        self.ids = self._tensors["ids"]
        """The calibration tokens, int64 [rows, T]."""

    def get(self, linear: str, device: str | torch.device) -> InputStatistics:
        """Return the statistics of the input of a linear layer by its full name."""
        k = self._tensors.shape(f"{linear}.absolute")[0]
        found = InputStatistics(k, device)
        found.tokens = self._tokens[linear]
        rows, columns = torch.triu_indices(k, k).unbind()
        gram = torch.zeros(k, k)
        gram[rows, columns] = self._tensors[f"{linear}.gram"]
        gram = gram + torch.triu(gram, 1).t()
        sums = (gram, self._tensors[f"{linear}.absolute"], self._tensors[f"{linear}.largest"])
        found._done = (sums[0].to(device), sums[1].to(device), sums[2].to(device))
        return found


class StatisticsWriter:
    """Writes statistics of the tokens ``ids`` into a new folder, which appears when the block ends well."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], ids: Tensor) -> None:
        if folder.exists():
            raise ConfigError(f"save_statistics: {folder} exists; use it as it is with --statistics, or remove it")
        self.folder, self.identity = folder, dict(identity)
        self._staged = folder.with_name(f".{folder.name}.building.{os.getpid()}")
        self._staged.mkdir(parents=True)
        self._writer = ShardWriter(self._staged, 1000)
        self._writer.add("ids", ids)
        self._tokens: dict[str, int] = {}

    def add(self, linear: str, statistics: InputStatistics) -> None:
        """Write what is known about the input of a linear layer: the Gram matrix's upper half and the sums."""
        gram, absolute, largest = statistics.sums()
        rows, columns = torch.triu_indices(len(gram), len(gram), device=gram.device).unbind()
        self._writer.add(f"{linear}.gram", gram[rows, columns])
        self._writer.add(f"{linear}.absolute", absolute)
        self._writer.add(f"{linear}.largest", largest)
        self._tokens[linear] = statistics.tokens

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._writer.close()
            index = {"format": "olive-statistics", "identity": self.identity, "tokens": self._tokens}
            (self._staged / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            self._staged.rename(self.folder)
        shutil.rmtree(self._staged, ignore_errors=True)


def read_index(folder: Path) -> dict[str, Any]:
    """Read a statistics folder's index; refuse a folder that is none."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or index.get("format") != "olive-statistics":
        raise ConfigError(f"statistics {folder}: not a finished folder of statistics (no {INDEX} of ours)")
    return index
