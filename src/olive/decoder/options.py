"""How a decoder graph is to be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from olive.decoder.provider import PROVIDERS, Provider

Precision = Literal["auto", "fp32", "fp16", "int8", "int4"]
Table = Literal["auto", "float", "int8", "int4"]
Algorithm = Literal["rtn", "kquant", "hqq"]
Cache = Literal["auto", "float32", "float16", "int8"]
BITS = {"fp32": None, "fp16": None, "float": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Options:
    """Precision of each kind of weight; integers that the checkpoint holds are kept whatever is said here."""

    precision: Precision = "auto"
    """Of the float linears in the layers; auto: what the provider computes in."""
    algorithm: Algorithm = "rtn"
    """How weights are rounded here."""
    group_size: int = 128
    """Input channels that share one scale, where weights are rounded here."""
    symmetric: bool = False
    """No zero points, where weights are rounded here."""
    lm_head: Table = "auto"
    embeddings: Table = "auto"
    accuracy_level: Literal[0, 4] = 4
    """Of MatMulNBits: 4 computes with int8 activations, 0 with float."""
    logits: Literal["all", "last"] = "all"
    """Positions that lm_head computes."""
    kv_cache: Cache = "auto"
    adapter_precision: Literal["fp32", "fp16"] = "fp32"
    """Of the adapters' inputs, where the graph computes in float32; else they are float16."""
    context_length: int | None = None
    chunk_size: int | None = None
    provider: str = "CPUExecutionProvider"

    @property
    def target(self) -> Provider:
        """What the execution provider takes."""
        return PROVIDERS[self.provider]

    @property
    def float16(self) -> bool:
        """Whether the graph computes in float16."""
        return self.target.float16 and self.precision != "fp32"

    @property
    def layer_bits(self) -> int | None:
        """Bits of the linears in the layers, None for float."""
        return BITS.get(self.precision)

    def head_bits(self, *, quantized: bool) -> int | None:
        """Bits of lm_head, None for float; ``quantized``: the checkpoint's layers hold integers.

        Rounded here, it is as coarse as the layers: it is read for every token, and speed was asked for. Beside
        integers that were fitted to data it would be the largest error, so there it has 8 bits.
        """
        if self.lm_head == "auto":
            return 8 if quantized else self.layer_bits
        return BITS[self.lm_head]

    def embedding_bits(self, *, quantized: bool, tied: bool) -> int | None:
        """Bits of the embeddings, None for float: those of a head that is ``tied`` to them, else 8, as one row is read
        for a token."""
        if self.embeddings != "auto":
            return BITS[self.embeddings]
        if tied:
            return self.head_bits(quantized=quantized)
        return 8 if quantized or self.layer_bits else None
