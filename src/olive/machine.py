"""What a run's bytes and times may depend on besides code and data: processor, memory, system, Python, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def machine(device: str) -> dict[str, Any]:
    """Return the facts of this machine; on ``cuda`` also its GPUs."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": _processor(),
        "cpus": usable_cpus(),
        "memory": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    facts |= {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if device == "cuda":
        import torch

        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    known = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
