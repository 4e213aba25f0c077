"""What the graph must look like for each of ONNX Runtime's execution providers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provider:
    """What an execution provider takes. Sources: the kernels' registrations in ONNX Runtime 1.32, GenAI's builder."""

    genai: str = ""
    """Its name in genai_config.json; none for the CPU, which is always there."""
    float16: bool = True
    """Computes in float16; else in float32."""
    packed_qkv: bool = True
    """Attention takes queries, keys and values in one tensor, and rotates them itself."""
    quick_gelu: bool = True
    """Has an operator for x sigmoid(x)."""
    accuracy_level: bool = False
    """Can round activations to int8 in products with integer weights."""
    mixed_cache: bool = False
    """Can keep keys and values in another type than it computes in."""
    experts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Provider options in genai_config.json."""


PROVIDERS = {
    "CPUExecutionProvider": Provider(float16=False, accuracy_level=True, mixed_cache=True, experts=True),
    "CUDAExecutionProvider": Provider(genai="cuda", options={"enable_cuda_graph": "0"}),
    "WebGpuExecutionProvider": Provider(genai="webgpu", quick_gelu=False, accuracy_level=True),
    "DmlExecutionProvider": Provider(genai="dml", packed_qkv=False, quick_gelu=False),
}
