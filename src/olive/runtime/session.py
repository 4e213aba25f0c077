"""A built decoder in ONNX Runtime, for its logits.

Shape letters: B batch, T tokens, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olive.errors import ConfigError, OliveError
from olive.runtime import adapters

LAST = "last.GatherND"
"""Node that keeps the last position alone, in a graph that was built to do so."""
CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class OnnxDecoder:
    """The graph of a model folder, loaded once; it gives the logits of all positions, also if it was built to give
    those of the last one."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        if not (folder / "model.onnx").is_file():
            raise ConfigError(f"{folder}: not an ONNX model folder (no model.onnx)")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Between two runs torch works on the logits: threads that wait by spinning would take its processors.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            model = _scoring_graph(folder) or str(folder / "model.onnx")
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each of ONNX Runtime's error classes derives from Exception alone
            message = f"{folder}: ONNX Runtime cannot load model.onnx: {error}; build the folder again"
            raise OliveError(message) from None
        self.folder = folder
        inputs = self._session.get_inputs()
        caches = [i for i in inputs if i.name.startswith("past_key_values.")]
        if not caches:
            raise ConfigError(f"{folder}: model.onnx is no decoder language model: it has no inputs past_key_values.*")
        self._caches = {i.name: CACHE_TYPES[i.type] for i in caches}
        self._cache_shape = _cache_shape(caches[0].shape, folder)
        self.context_length = int(_genai(folder)["context_length"])
        """The most tokens that a text may have."""
        self._adapters: dict[Path, object] = {}

    @property
    def vocabulary(self) -> int:
        """Numbers per position that the graph gives."""
        size = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        return size if isinstance(size, int) else int(_genai(self.folder)["vocab_size"])

    def logits(self, ids: np.ndarray, adapter: Path | None = None, lengths: Sequence[int] | None = None) -> np.ndarray:
        """Return logits float32 [B, T, V] of token ids [B, T], read from the start with an empty cache.

        ``lengths``: tokens of each row, if shorter ones are padded on the right; what is returned for padding has no
        meaning.
        """
        logits: np.ndarray = self._run(["logits"], ids, adapter, lengths)["logits"]
        if logits.shape[1] != ids.shape[1]:
            raise OliveError(
                f"{self.folder}: the graph gives logits of the last token only, so text cannot be scored with it; "
                "build it again with olive auto-opt, or without the builder's option prune_lm_head"
            )
        return logits.astype(np.float32, copy=False)

    def run(
        self, ids: np.ndarray, adapter: Path | None = None, lengths: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Return all outputs for token ids [B, T]: the logits, and keys and values [B, H, T, D] of each layer."""
        return self._run([output.name for output in self._session.get_outputs()], ids, adapter, lengths)

    def _run(
        self, names: list[str], ids: np.ndarray, adapter: Path | None, lengths: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        import onnxruntime

        mask = np.ones(ids.shape, np.int64)
        for row, length in enumerate(lengths or ()):
            mask[row, length:] = 0
        feed = {"input_ids": np.asarray(ids, np.int64), "attention_mask": mask}
        heads, size = self._cache_shape
        for name, dtype in self._caches.items():
            feed[name] = np.empty((len(ids), heads, 0, size), dtype)  # [B, H, 0, D]
        run = onnxruntime.RunOptions()
        run.log_severity_level = 3
        if adapter is not None:
            run.add_active_adapter(self._adapter(adapter))
        return dict(zip(names, self._session.run(names, feed, run), strict=True))

    def _adapter(self, file: Path) -> object:
        import onnxruntime

        if file not in self._adapters:
            adapters.check_file(file, adapters.read_graph(self.folder))
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(file))
            self._adapters[file] = loaded
        return self._adapters[file]


def _scoring_graph(folder: Path) -> bytes | None:
    """Return the graph without the step that keeps the last position alone; None if it has no such step."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    last = next((node for node in model.graph.node if node.name == LAST), None)
    if last is None:
        return None
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[i] = last.input[0]
    model.graph.node.remove(last)
    for output in model.graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    contents: bytes = model.SerializeToString()
    return contents


def _cache_shape(shape: list[int | str], folder: Path) -> tuple[int, int]:
    """Return heads and head size of the cache, from the graph's inputs or, where they are symbols, GenAI's config."""
    heads, size = shape[1], shape[3]
    if isinstance(heads, int) and isinstance(size, int):
        return heads, size
    decoder = _genai(folder)["decoder"]
    return decoder["num_key_value_heads"], decoder["head_size"]


def _genai(folder: Path) -> dict[str, Any]:
    """Return the model's part of genai_config.json."""
    found: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    return found
