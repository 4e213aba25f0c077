"""What the fixture ``pair`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from olive.model import Model


@dataclass(frozen=True)
class Pair:
    """One model in both forms."""

    hf: Model
    onnx: Model
    peft: Path
    onnx_adapter: Path
