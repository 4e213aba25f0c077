"""How far a model's next-token distributions are from its source's: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Quality:
    """Sums over windows of text; add each window once, then read the figures."""

    def __init__(self) -> None:
        self._source_loss = self._loss = self._kl = self._same = 0.0
        self._positions = self._predictions = 0

    def add(self, source: Tensor, candidate: Tensor, ids: Tensor) -> None:
        """Count windows of tokens ``ids`` [B, T] with both models' logits [B, T, V].

        The KL divergence is that of the candidate from the source, in nats, over all positions; the loss is over the
        T - 1 positions whose next token is known.
        """
        p = torch.log_softmax(source.float(), dim=-1)
        q = torch.log_softmax(candidate.float(), dim=-1)
        following = ids[:, 1:, None]
        self._source_loss -= p[:, :-1].gather(-1, following).double().sum().item()
        self._loss -= q[:, :-1].gather(-1, following).double().sum().item()
        self._kl += (p.exp() * (p - q)).sum(-1).clamp_min(0).double().sum().item()
        self._same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        self._positions += ids.numel()
        self._predictions += following.numel()

    def figures(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {
            "perplexity_source": _exp(self._source_loss / self._predictions),
            "perplexity": _exp(self._loss / self._predictions),
            "kl_divergence": self._kl / self._positions,
            "top1_agreement": self._same / self._positions,
            "tokens": self._positions,
        }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
