"""SmoothQuant: move the spread of the activations' channels into the weights, so that both can be rounded.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438 (2022), equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1e4
"""Bound of the factor, either way: beyond it a channel is all but silent, and float16 would lose it."""


def smooth_scale(weights: list[Tensor], absolute_max: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the factor s [K] by which the input is divided and the columns of all ``weights`` [N_i, K] multiplied.

    ``s = absolute_max^alpha / max(abs(weight))^(1 - alpha)`` per channel, float32, with ``absolute_max`` [K] the
    largest magnitude of each input channel. ``alpha`` 0 evens out the weights, 1 the activations. A channel that is
    always 0, or that no weight reads, keeps its scale: s = 1.
    """
    inputs = absolute_max.float()
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scale = (inputs**alpha / columns ** (1 - alpha)).clamp(1 / LARGEST, LARGEST)
    return torch.where((inputs > 0) & (columns > 0), scale, torch.ones_like(scale))
