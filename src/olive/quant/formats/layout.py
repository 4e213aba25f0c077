"""What a layout of quantized checkpoints answers for itself; each module beside this one is one layout.

Shape letters: N out channels, K in channels, S group size, G = K / S groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from olive.errors import ConfigError
from olive.quant.affine import QuantizedWeight
from olive.quant.formats.shards import Shards

End = Literal["embeddings", "lm_head"]
NAMES_OF_ENDS: dict[str, End] = {
    "embed_tokens": "embeddings", "word_embeddings": "embeddings", "embed_in": "embeddings", "wte": "embeddings",
    "lm_head": "lm_head", "embed_out": "lm_head",
}  # fmt: skip
"""Last part of the module's name in transformers' decoders."""


class Grouping(NamedTuple):
    """How one module's weight is stored."""

    bits: int
    group_size: int
    """Input channels that share one scale; all K of them where the group is ``whole``."""
    whole: bool = False
    """One group per output channel, which config.json calls group size -1."""

    @property
    def written_size(self) -> int:
        """Group size as config.json says it."""
        return -1 if self.whole else self.group_size


class Layout(Protocol):
    """A layout: how one weight's integers become tensors and back, and how config.json tells of them."""

    @property
    def BITS(self) -> tuple[int, ...]:
        """Bits per weight that it holds."""

    @property
    def PARTS(self) -> tuple[str, ...]:
        """Names of a module's tensors, after its name and a dot; the first holds the codes."""

    @property
    def ENDS(self) -> tuple[End, ...]:
        """Which ends of the model it holds besides the linears of the layers."""

    @property
    def MIXED(self) -> bool:
        """Whether bits and group size may differ between modules."""

    def fits(self, n: int, k: int, bits: int, group_size: int) -> bool:
        """Whether a weight [N, K] in groups of ``group_size`` (-1: all of K) can be stored."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Lay out one weight's integers."""

    def unpack(self, parts: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> QuantizedWeight:
        """Read one weight's tensors back; ``own`` are its module's settings. Raises ConfigError, naming ``where``."""

    def shape(self, module: str, tensors: Shards, own: Mapping[str, Any]) -> tuple[int, int]:
        """Return [N, K] of a stored weight without reading its codes."""

    def settings(
        self,
        bits: int,
        group_size: int,
        symmetric: bool,
        modules: Mapping[str, Grouping | None],
        *,
        tied: bool = False,
    ) -> dict[str, Any]:
        """Return config.json's ``quantization_config``; ``modules`` that stay float map to None, and ``tied`` tells
        that lm_head is the embeddings."""

    def module_settings(self, settings: Mapping[str, Any], module: str) -> dict[str, Any]:
        """Return a module's own settings, among them ``bits``, from the checkpoint's."""

    def check(self, settings: Mapping[str, Any], where: str) -> None:
        """Refuse variants that are not read: ConfigError."""


def end_of(module: str) -> End | None:
    """Say whether a module is one of the model's ends, by its name; None for a linear of a layer."""
    return NAMES_OF_ENDS.get(module.rpartition(".")[2])


def check_order(g_idx: Tensor, group_size: int, where: str) -> None:
    """Refuse activation order: it would need a gather in front of every product."""
    k = len(g_idx)
    size = k if group_size == -1 else group_size
    if not torch.equal(g_idx.long(), torch.arange(k) // size):
        raise ConfigError(f"{where}: activation order (desc_act) is not supported; use static groups")
