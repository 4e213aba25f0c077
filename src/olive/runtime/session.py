"""A built decoder in ONNX Runtime, for its logits.

Shape letters: B batch, T tokens, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from olive.errors import ConfigError, OliveError
from olive.runtime import adapters


class OnnxDecoder:
    """The graph of a model folder, loaded once."""

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
            self._session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # each of ONNX Runtime's error classes derives from Exception alone
            message = f"{folder}: ONNX Runtime cannot load model.onnx: {error}; build the folder again"
            raise OliveError(message) from None
        self.folder = folder
        inputs = self._session.get_inputs()
        self._caches = [i.name for i in inputs if i.name.startswith("past_key_values.")]
        if not self._caches:
            raise ConfigError(f"{folder}: model.onnx is no decoder language model: it has no inputs past_key_values.*")
        self._cache_shape = _cache_shape(next(i.shape for i in inputs if i.name in self._caches), folder)
        self._adapters: dict[Path, object] = {}

    @property
    def vocabulary(self) -> int:
        """Numbers per position that the graph gives."""
        size = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        if isinstance(size, int):
            return size
        return int(json.loads((self.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"])

    def logits(self, ids: np.ndarray, adapter: Path | None = None) -> np.ndarray:
        """Return logits float32 [B, T, V] of token ids [B, T], read from the start with an empty cache."""
        import onnxruntime

        feed = {"input_ids": np.asarray(ids, np.int64), "attention_mask": np.ones(ids.shape, np.int64)}
        heads, size = self._cache_shape
        for name in self._caches:
            feed[name] = np.empty((len(ids), heads, 0, size), np.float32)  # [B, H, 0, D]
        run = onnxruntime.RunOptions()
        run.log_severity_level = 3
        if adapter is not None:
            run.add_active_adapter(self._adapter(adapter))
        found = self._session.run(["logits"], feed, run)[0]
        if found.shape[1] != feed["input_ids"].shape[1]:
            raise OliveError(
                f"{self.folder}: the graph gives logits of the last token only, so text cannot be scored with it; "
                "build it again with olive auto-opt, or without the builder's option prune_lm_head"
            )
        return found

    def _adapter(self, file: Path) -> object:
        import onnxruntime

        if file not in self._adapters:
            adapters.check_file(file, self.folder)
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(file))
            self._adapters[file] = loaded
        return self._adapters[file]


def _cache_shape(shape: list[int | str], folder: Path) -> tuple[int, int]:
    """Return heads and head size of the cache, from the graph's inputs or, where they are symbols, GenAI's config."""
    heads, size = shape[1], shape[3]
    if isinstance(heads, int) and isinstance(size, int):
        return heads, size
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    return decoder["num_key_value_heads"], decoder["head_size"]
