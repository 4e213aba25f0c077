"""Decoder language models as ONNX graphs, built from config.json and weights without tracing."""
