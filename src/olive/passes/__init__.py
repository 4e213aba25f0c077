"""The passes, by name. A pass is imported only when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from olive.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from olive.passes.base import Pass

PASSES = {
    "rtn": "olive.passes.rtn:Rtn",
    "kquant": "olive.passes.kquant:Kquant",
    "hqq": "olive.passes.hqq:Hqq",
    "awq": "olive.passes.awq:Awq",
    "gptq": "olive.passes.gptq:Gptq",
    "tune": "olive.passes.tune:Tune",
    "distill": "olive.passes.distill:Distill",
    "best": "olive.passes.best:Best",
    "rotate": "olive.passes.rotate:Rotate",
    "smooth": "olive.passes.smooth:Smooth",
    "dequantize": "olive.passes.dequantize:Dequantize",
    "lora": "olive.passes.lora:Lora",
    "decoder": "olive.passes.decoder:Decoder",
}


def pass_class(name: str, where: str = "pass") -> type[Pass]:
    """Return the class of a pass by its name."""
    if name not in PASSES:
        raise ConfigError(f"{where}: unknown pass {name!r}{did_you_mean(str(name), PASSES)}")
    module, _, attribute = PASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def pass_name(instance: Pass) -> str:
    """Return the name that a pass is registered under."""
    kind = type(instance)
    own = f"{kind.__module__}:{kind.__qualname__}"
    return next(name for name, place in PASSES.items() if place == own)
