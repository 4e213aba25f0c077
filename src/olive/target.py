"""Where the model will run: a device and an ONNX Runtime execution provider."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from olive.config import Config

PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "gpu": ("CUDAExecutionProvider",),
}


class Target(Config):
    """Device and execution provider of the finished model."""

    device: Literal["cpu", "gpu"] = "cpu"
    """Device that the model will run on."""
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider"] = "CPUExecutionProvider"
    """ONNX Runtime execution provider that the model will run on."""

    @model_validator(mode="after")
    def _fits(self) -> Target:
        if self.provider not in PROVIDERS[self.device]:
            raise ValueError(f"provider {self.provider} does not run on device {self.device}")
        return self


def compute_device(asked: str) -> str:
    """Resolve ``auto`` to the device that passes compute on here: ``cuda`` where there is one, else ``cpu``."""
    import torch

    from olive.errors import ConfigError

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--compute_device cuda: no CUDA device is available here; use --compute_device cpu")
    return asked
