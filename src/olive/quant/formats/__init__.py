"""Layouts of quantized checkpoints, by the name that config.json gives them (``quant_method``)."""

from olive.quant.formats import awq, compressed_tensors, gptq, olive
from olive.quant.formats.layout import Layout

FORMATS: dict[str, Layout] = {
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "olive": olive,
}


def holds(method: str, bits: int) -> bool:
    """Whether weights of so many bits can be stored in the layout ``method``."""
    return bits in FORMATS[method].BITS
