"""Confidence intervals by the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

RESAMPLES = 1000
CONFIDENCE = 0.95


def interval(values: Sequence[float], statistic: Callable[[Sequence[float]], float], seed: int) -> tuple[float, float]:
    """Return the range that holds the statistic with 95 % confidence: of samples drawn anew from ``values``, the middle
    95 % of their statistics."""
    source = random.Random(seed)
    found = sorted(statistic(source.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return found[cut], found[-cut - 1]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies, between neighbours by line (numpy's default)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
