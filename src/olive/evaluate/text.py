"""Quality of a language model on a text: perplexity, and how near it is to the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.data.spec import DataSpec
from olive.errors import ConfigError, OliveError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.metrics import METRICS, Metric
from olive.model import Model

if TYPE_CHECKING:
    from torch import Tensor

AGAINST_SOURCE = ("kl_divergence", "top1_agreement")


class TextQuality(Evaluator):
    """Perplexity on a text, and on the same tokens KL divergence and top-1 agreement with the source.

    The text is cut into windows of equal length that are read one by one; the same text gives the same numbers.
    Products with int8 activations (``accuracy_level`` 4 of a graph) count with what they lose; the logits are float32.
    """

    names = ("perplexity", *AGAINST_SOURCE)

    data: DataSpec = DataSpec()
    """What to measure on; by default a small shipped text, which is not the one that quantizers are fitted to. All of
    it is used unless max_samples says otherwise."""
    compare: bool = True
    """Compare with the source model; without it, only perplexity is given."""

    def metrics(self) -> dict[str, Metric]:
        return {name: METRICS[name] for name in self.names if self.compare or name not in AGAINST_SOURCE}

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        from olive.evaluate.logits import logits
        from olive.evaluate.quality import Loss, Quality

        if self.compare and ctx.source is None:
            raise ConfigError(f"{', '.join(AGAINST_SOURCE)}: compare with a source model, and none was given")
        source = ctx.source if self.compare else None
        ids = self.ids(model, source)
        kept = ctx.cache_dir if model == ctx.source else None  # a candidate is measured once: not worth the space
        found = logits(model, ctx.adapter, ids, ctx.compute_device, kept=kept)
        ctx.note(tokens=ids.numel(), windows=len(ids))
        if source is None:
            loss = Loss()
            for row, got in enumerate(found):
                loss.add(_finite(got, model), ids[row : row + 1])
            return {"perplexity": loss.perplexity()}
        quality = Quality()
        same = (source, ctx.source_adapter) == (model, ctx.adapter)
        expected = None if same else logits(source, ctx.source_adapter, ids, ctx.compute_device, kept=ctx.cache_dir)
        for row, got in enumerate(found):
            want = got if expected is None else next(expected)
            if want.shape != got.shape:
                raise ConfigError(
                    f"{model.path}: has a vocabulary of {got.shape[-1]} entries, {source.path} one of "
                    f"{want.shape[-1]}; compare models of one vocabulary"
                )
            quality.add(want.to(got.device), _finite(got, model), ids[row : row + 1])
        figures = quality.figures()
        ctx.note(perplexity_source=figures["perplexity_source"])
        return {name: figures[name] for name in self.names}

    def ids(self, model: Model, source: Model | None) -> Tensor:
        """Return the windows, int64 [rows, T], as the tokenizer of the source reads them; the model's must agree."""
        from olive.runtime.torch_model import load_tokenizer

        models = [model] if source is None or source == model else [source, model]
        length = min(self.data.max_seq_len, *(context_length(one) for one in models))
        read = [self._windows(load_tokenizer(one.path, one.trust_remote_code), length) for one in models]
        if len(read) > 1 and not read[0].equal(read[1]):
            raise ConfigError(
                f"{model.path}: its tokenizer reads the text otherwise than that of {models[0].path}; the next tokens "
                "of the two cannot be compared"
            )
        return read[0]

    def _windows(self, tokenizer: Any, length: int) -> Tensor:
        from olive.data.rows import describe, heldout_text
        from olive.data.samples import text_windows, windows

        if self.data.name == "text" and not self.data.files:
            return text_windows(heldout_text(), tokenizer, length, self.data.max_samples)
        cut = windows(self.data.model_copy(update={"max_seq_len": length}), tokenizer)
        if cut.shape[1] < 2:  # [rows, T]
            raise ConfigError(f"{describe(self.data)}: one token has no next one to predict; give more text")
        return cut


def context_length(model: Model) -> int:
    """Return the most tokens that a model's configuration allows."""
    from olive.quant.formats.checkpoint import longest, read_config

    genai = model.path / "genai_config.json"
    if model.kind == "onnx" and genai.is_file():
        return int(json.loads(genai.read_text(encoding="utf-8"))["model"].get("context_length") or 1 << 30)
    return longest(read_config(Path(model.path)))


def _finite(logits: Tensor, model: Model) -> Tensor:
    import torch

    if not torch.isfinite(logits).all():
        raise OliveError(f"{model.path}: gives logits that are not finite numbers; build or quantize it again")
    return logits
