"""The metrics that Olive knows: what each is called, which way is better, in what unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is."""

    name: str
    direction: Literal["minimize", "maximize"]
    unit: str
    help: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "minimize", "", "Exponential of the mean negative log-likelihood of a text's tokens."),
        Metric("kl_divergence", "minimize", "nats/token", "Mean KL divergence from the source's next-token choices."),
        Metric("top1_agreement", "maximize", "", "Share of tokens where source and model have the same likeliest one."),
        Metric("accuracy", "maximize", "", "Share of rows that are answered right."),
        Metric("f1", "maximize", "", "Harmonic mean of precision and recall, averaged over the classes."),
        Metric("exact_match", "maximize", "", "Share of answers that equal the expected text."),
        Metric("time_to_first_token", "minimize", "s", "Time from the prompt to the first token."),
        Metric("tokens_per_second", "maximize", "tokens/s", "Tokens generated per second after the first."),
        Metric("prefill_tokens_per_second", "maximize", "tokens/s", "Tokens of the prompt read per second."),
        Metric("latency_p50", "minimize", "ms", "Time of one run: half of the runs are faster."),
        Metric("latency_p90", "minimize", "ms", "Time of one run: nine in ten are faster."),
        Metric("latency_p99", "minimize", "ms", "Time of one run: 99 in 100 are faster."),
        Metric("peak_memory", "minimize", "bytes", "Most memory that the process held."),
        Metric("size_on_disk", "minimize", "bytes", "Bytes of the model's files."),
    )
}
