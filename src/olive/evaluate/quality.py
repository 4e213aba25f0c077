"""How far a model's next-token distributions are from its source's: perplexity, KL divergence, top-1 agreement.

Logits are taken some positions at a time, so that a large vocabulary needs no large copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

POSITIONS = 64
"""Positions of a window that are computed at once."""


class Quality:
    """Sums over windows of text; add each window once, then read the figures."""

    def __init__(self) -> None:
        self._source, self._candidate = Loss(), Loss()
        self._kl = self._same = 0.0
        self._positions = 0

    def add(self, source: Tensor, candidate: Tensor, ids: Tensor) -> None:
        """Count windows of tokens ``ids`` [B, T] with both models' logits [B, T, V].

        The KL divergence is that of the candidate from the source, in nats, over all positions; the loss is over the
        T - 1 positions whose next token is known.
        """
        for (p, following), (q, _) in zip(_parts(source, ids), _parts(candidate, ids), strict=True):
            self._source.count(p, following)
            self._candidate.count(q, following)
            self._kl += (p.exp() * (p - q)).sum(-1).clamp_min(0).double().sum().item()
            self._same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        self._positions += ids.numel()

    def figures(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {
            "perplexity_source": self._source.perplexity(),
            "perplexity": self._candidate.perplexity(),
            "kl_divergence": self._kl / self._positions,
            "top1_agreement": self._same / self._positions,
            "tokens": self._positions,
        }


class Loss:
    """The loss of one model over windows of text."""

    def __init__(self) -> None:
        self._sum, self._predictions = 0.0, 0

    def add(self, logits: Tensor, ids: Tensor) -> None:
        """Count windows of tokens ``ids`` [B, T] with the model's logits [B, T, V]."""
        for logprobs, following in _parts(logits, ids):
            self.count(logprobs, following)

    def count(self, logprobs: Tensor, following: Tensor) -> None:
        """Count the positions [B, T, V] whose next tokens [B, T] are known: the first ones."""
        chosen = logprobs[:, : following.shape[1]].gather(-1, following[..., None])
        self._sum -= chosen.double().sum().item()
        self._predictions += following.numel()

    def perplexity(self) -> float:
        """Return the exponential of the mean loss."""
        loss = self._sum / self._predictions
        return math.exp(loss) if loss < 700 else math.inf


def _parts(logits: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some positions' log probabilities [B, part, V] and the tokens that follow them, [B, part] or one fewer."""
    ids = ids.to(logits.device)
    for start in range(0, ids.shape[1], POSITIONS):
        stop = start + POSITIONS
        yield torch.log_softmax(logits[:, start:stop].float(), dim=-1), ids[:, start + 1 : stop + 1]
