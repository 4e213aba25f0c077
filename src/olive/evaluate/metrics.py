"""What can be measured of a model: every metric with its direction and unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A figure of a model."""

    name: str
    direction: Literal["minimize", "maximize"]
    unit: str
    help: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "minimize", "", "perplexity on a text"),
        Metric("kl_divergence", "minimize", "nats/token", "KL divergence from the source on a text"),
        Metric("top1_agreement", "maximize", "", "share of tokens where model and source agree on the likeliest next"),
        Metric("size_on_disk", "minimize", "bytes", "bytes of the model's files"),
    )
}
