"""How a decoder graph is to be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "int8", "int4"]
Table = Literal["auto", "float", "int8", "int4"]
BITS = {"fp32": None, "float": None, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Options:
    """Precision of each kind of weight; integers that the checkpoint holds are kept whatever is said here."""

    precision: Precision = "fp32"
    """Of the float linears in the layers."""
    group_size: int = 32
    """Input channels that share one scale, where weights are rounded here."""
    symmetric: bool = False
    """No zero points, where weights are rounded here."""
    lm_head: Table = "auto"
    embeddings: Table = "auto"
    accuracy_level: Literal[0, 4] = 4
    """Of MatMulNBits: 4 computes with int8 activations, 0 with float32."""

    def table_bits(self, table: Table, *, quantized: bool) -> int | None:
        """Bits of lm_head or the embeddings, None for float; ``quantized``: the layers hold integers."""
        if table == "auto":
            return 8 if quantized or self.precision != "fp32" else None
        return BITS[table]
