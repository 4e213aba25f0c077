"""Where the model will run: a device and an ONNX Runtime execution provider."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from olive.config import Config
from olive.errors import ConfigError

Provider = Literal[
    "CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider", "DmlExecutionProvider"
]  # fmt: skip
PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "gpu": ("CUDAExecutionProvider", "WebGpuExecutionProvider", "DmlExecutionProvider"),
}


class Target(Config):
    """Device and execution provider of the finished model."""

    device: Literal["cpu", "gpu"] = "cpu"
    """Device that the model will run on."""
    provider: Provider | None = None
    """ONNX Runtime execution provider that the model will run on; by default the device's first."""

    @model_validator(mode="after")
    def _fits(self) -> Target:
        allowed = PROVIDERS[self.device]
        if self.provider is not None and self.provider not in allowed:
            raise ValueError(f"provider {self.provider} does not run on device {self.device}; use {', '.join(allowed)}")
        return self

    def execution_provider(self) -> Provider:
        """Return the provider, the device's first if none was named."""
        return self.provider or PROVIDERS[self.device][0]


def compute_device(asked: str) -> str:
    """Resolve ``auto`` to the device that passes compute on here: ``cuda`` where there is one, else ``cpu``."""
    if asked == "cpu" or (asked == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"  # torch takes a second to import: do not ask it where there is no driver
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "auto":
        return "cpu"
    raise ConfigError("compute_device cuda: torch sees no CUDA device here; use cpu")
