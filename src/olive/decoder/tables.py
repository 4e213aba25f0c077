"""Token embeddings and lm_head in the graph; a tied model has one table for both.

Shape letters: B batch, T tokens, V vocabulary, K channels, S group size, G = K / S groups.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from olive.decoder import weights
from olive.decoder.families import Architecture
from olive.decoder.linear import Linears, Stored
from olive.quant.affine import QuantizedWeight

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


class Tables:
    """The two ends of the graph."""

    def __init__(self, linears: Linears, arch: Architecture) -> None:
        self.linears, self.arch, self.graph = linears, arch, linears.graph
        options, quantized = linears.options, bool(linears.checkpoint.quantized)
        self.embedding_bits = options.table_bits(options.embeddings, quantized=quantized)
        self.head_bits = options.table_bits(options.lm_head, quantized=quantized)
        self._float: ir.Value | None = None
        self._stored: Stored | None = None

    def embed(self, ids: ir.Value) -> ir.Value:
        """Return the embeddings [B, T, K] of token ids int64 [B, T]."""
        weight = self.linears.load(EMBEDDINGS, self.embedding_bits)
        self.linears.done(EMBEDDINGS)
        if isinstance(weight, Tensor):
            self._float = self._table(weight)
            return self.graph.op("Gather", [self._float, ids], f"{EMBEDDINGS}.Gather")
        self._stored = stored = self.linears.store(EMBEDDINGS, weight)
        v, k = stored.shape
        # the same bytes as in MatMulNBits, without the axis of groups: [V, G, S * bits / 8] -> [V, K * bits / 8]
        rows = self.graph.alias(f"{EMBEDDINGS}.rows", stored.weight, (v, k * stored.bits // 8))
        inputs = [rows, ids, stored.scales, *([stored.zero_points] if stored.zero_points else [])]
        attributes = {"bits": stored.bits, "block_size": stored.group_size, "gather_axis": 0, "quantize_axis": 1}
        return self.graph.op("GatherBlockQuantized", inputs, f"{EMBEDDINGS}.GatherBlockQuantized", attributes)

    def head(self, x: ir.Value) -> ir.Value:
        """Return the logits [B, T, V] of ``x`` [B, T, K]."""
        return self._tied_head(x) if self.arch.tied else self.linears.linear(x, [HEAD], HEAD, self.head_bits)

    def _tied_head(self, x: ir.Value) -> ir.Value:
        linears = self.linears
        held = EMBEDDINGS in linears.checkpoint.quantized  # its integers are those of the head, whatever is asked
        if self._stored and (held or self._stored.bits == self.head_bits):
            linears.bits[HEAD] = self._stored.bits
            return linears.multiply(x, self._stored, HEAD)
        if self._float is None or self.head_bits is not None:  # asked for in two precisions: a table of its own
            weight = linears.load(EMBEDDINGS, self.head_bits, recorded_as=HEAD)
            if isinstance(weight, QuantizedWeight):
                return linears.multiply(x, linears.store(HEAD, weight), HEAD)
            self._float = self._float or self._table(weight)
        linears.bits[HEAD] = "float"
        # reads the table by rows as it is; a Transpose would be folded into a copy on every load
        return self.graph.op("FusedMatMul", [x, self._float], f"{HEAD}.FusedMatMul", {"transB": 1})

    def _table(self, weight: Tensor) -> ir.Value:
        shape = (weight.shape[0], weight.shape[1])
        return self.graph.stream(f"{EMBEDDINGS}.weight", ir.DataType.FLOAT, shape, weights.float_rows(weight))
