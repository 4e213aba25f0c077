"""The metrics, each with its direction and unit: what a goal, a table or a plot must know before it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is."""

    name: str
    direction: Direction
    unit: str
    help: str

    def better(self, a: float, b: float) -> bool:
        """Tell whether ``a`` is strictly better than ``b``."""
        return a < b if self.direction == "minimize" else a > b


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _table(
    Metric("perplexity", "minimize", "", "exponential of the mean loss per token on a text"),
    Metric("kl_divergence", "minimize", "nats/token", "of the next-token distributions from the source's"),
    Metric("top1_agreement", "maximize", "", "share of positions whose likeliest next token is the source's"),
    Metric("accuracy", "maximize", "", "share of rows that are classified right"),
    Metric("f1", "maximize", "", "mean F1: over the labels of a classification, over the words of generated answers"),
    Metric("exact_match", "maximize", "", "share of rows whose generated answer is the expected one"),
    Metric("time_to_first_token", "minimize", "s", "from a prompt of some tokens to the first token of the answer"),
    Metric("tokens_per_second", "maximize", "tokens/s", "generated per second after the first token"),
    Metric("prefill_tokens_per_second", "maximize", "tokens/s", "of a prompt, read per second"),
    Metric("latency_p50", "minimize", "ms", "median time of one run of a graph"),
    Metric("latency_p90", "minimize", "ms", "90th percentile of the time of one run"),
    Metric("latency_p99", "minimize", "ms", "99th percentile of the time of one run"),
    Metric("peak_memory", "minimize", "bytes", "largest resident memory of a process that loads the model and uses it"),
    Metric("size_on_disk", "minimize", "bytes", "of the model's files"),
)
"""The built-in metrics. lm-eval's tasks and user functions declare their own, with the direction that they have."""
