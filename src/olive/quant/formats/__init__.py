"""Layouts of quantized checkpoints, by the name that config.json gives them (``quant_method``)."""

from olive.quant.formats import awq, gptq

FORMATS = {"awq": awq, "gptq": gptq}
