"""Quality on a text, against the source."""

from __future__ import annotations

import hashlib
import os

from olive.data.spec import DataSpec
from olive.errors import ConfigError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.model import Model


class TextQuality(Evaluator):
    """Perplexity, KL divergence and top-1 agreement on a text."""

    names = ("perplexity", "kl_divergence", "top1_agreement")

    data: DataSpec | None = None
    """The text; by default a small shipped one."""

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        import torch

        from olive.data.rows import heldout_text
        from olive.data.samples import text_windows, windows
        from olive.evaluate import quality
        from olive.evaluate.logits import checkpoint_logits
        from olive.runtime.session import OnnxDecoder
        from olive.runtime.torch_model import load_tokenizer

        if ctx.source is None:
            raise ConfigError("quality: needs the source model to compare with")
        tokenizer = load_tokenizer(ctx.source.path, ctx.source.trust_remote_code)
        ids = windows(self.data, tokenizer) if self.data else text_windows(heldout_text(), tokenizer, 256, 8)
        kept = ctx.cache_dir / f"{hash_of(str(ctx.source.path), ids)}.pt" if ctx.cache_dir else None
        if kept is not None and kept.is_file():
            expected = torch.load(kept, mmap=True)
        else:
            expected = [row.cpu() for row in checkpoint_logits(ctx.source, ids, ctx.compute_device)]
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                fresh = kept.with_suffix(f".{os.getpid()}")
                torch.save(expected, fresh)
                fresh.rename(kept)
        if model.kind == "hf":
            found = checkpoint_logits(model, ids, ctx.compute_device)
        else:
            decoder = OnnxDecoder(model.path)
            found = (torch.from_numpy(decoder.logits(row[None].numpy(), None)) for row in ids)
        sums = quality.Quality()
        for row, (want, got) in enumerate(zip(expected, found, strict=True)):
            sums.add(want.cpu(), got.cpu(), ids[row : row + 1])
        figures = sums.figures()
        return {name: figures[name] for name in self.metrics()}


def hash_of(path: str, ids: object) -> str:
    return hashlib.sha256(f"{path} {ids.tolist()}".encode()).hexdigest()[:32]  # type: ignore[attr-defined]
