"""Calibration rows that are kept from the quantizers, to compare their results with the float model on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from olive.errors import ConfigError
from olive.model import Model

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 8
"""Rows that are held back, at most."""
KEPT_LOGITS = 1 << 28
"""Values of the float model's logits that are kept in memory for comparing; fewer rows are held back if need be."""


def hold_back(model: Model, ids: Tensor, why: str) -> tuple[Tensor, Tensor]:
    """Return the rows [rows, T] for the quantizers and, taken evenly from among them, the rows to compare on; ``why``
    names what asks for it."""
    import torch

    count = max(1, min(ROWS, len(ids) // 4, KEPT_LOGITS // (vocabulary(model) * ids.shape[1])))
    if len(ids) < 2:
        raise ConfigError(f"{why}: one row of calibration data is too little to choose by; give more data")
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[[(2 * i + 1) * len(ids) // (2 * count) for i in range(count)]] = True
    return ids[~held], ids[held]


def vocabulary(model: Model) -> int:
    """Return how many logits a token has, at most."""
    from olive.quant.formats.checkpoint import read_config

    config = read_config(model.path)
    return int((config.get("text_config") or config).get("vocab_size") or 1 << 17)


class HeldBack:
    """The float model's logits on the held-back rows, and how near another model comes to them."""

    def __init__(self, source: Model, ids: Tensor, device: str) -> None:
        from olive.evaluate.logits import checkpoint_logits

        self.ids, self.device, self.trust = ids, device, source.trust_remote_code
        self.expected = [row.cpu() for row in checkpoint_logits(source, ids, device)]

    def compare(self, model: Model) -> dict[str, float]:
        """Return perplexities, KL divergence and top-1 agreement."""
        from olive.evaluate.logits import checkpoint_logits
        from olive.evaluate.quality import Quality

        quality = Quality()
        found = checkpoint_logits(replace(model, trust_remote_code=self.trust), self.ids, self.device)
        for row, (want, got) in enumerate(zip(self.expected, found, strict=True)):
            quality.add(want.to(got.device), got, self.ids[row : row + 1].to(got.device))
        figures = quality.figures()
        return {name: figures[name] for name in ("perplexity_source", "perplexity", "kl_divergence", "top1_agreement")}
