"""Olive (ONNX live): from a checkpoint to the best model for ONNX Runtime on a chosen device."""

__version__ = "0.1.0"
