"""The record of a run: what ran and what was cached, facts, sizes, figures; as JSON and as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class StepRecord:
    """One step of a run."""

    name: str
    key: str
    cached: bool
    seconds: float
    """Time in this run; a cached step takes almost none."""
    facts: dict[str, Any]


@dataclass
class Report:
    """Everything a run has to say for itself."""

    workflow: dict[str, Any]
    output: str
    steps: list[StepRecord] = field(default_factory=list)
    source_bytes: int = 0
    output_bytes: int = 0
    verification: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        """Yield the report as a few lines for a terminal."""
        for step in self.steps:
            yield f"{step.name:<12} {'cached' if step.cached else f'{step.seconds:.1f} s'}"
            fallbacks = all_fallbacks(step.facts)
            for name, what in list(fallbacks.items())[:4]:
                yield f"{'':<12} {name}: {what}"
            if len(fallbacks) > 4:
                yield f"{'':<12} and {len(fallbacks) - 4} more linear layers; the report lists them"
            yield from _candidates(step.facts.get("candidates") or [], step.facts.get("picked"))
            yield from _allocation(step.facts.get("allocation"))
            for name in ("held_back_loss_before", "held_back_loss_after", "warning"):
                if name in step.facts:
                    value = step.facts[name]
                    yield f"{'':<12} {name}: {value:.4f}" if isinstance(value, float) else f"{'':<12} {name}: {value}"
        yield f"{'size':<12} {self.source_bytes / 1e6:.1f} MB -> {self.output_bytes / 1e6:.1f} MB"
        yield from _figures("verified", self.verification or {"level": "none: not verified"})
        yield f"{'output':<12} {self.output}"


def all_fallbacks(facts: dict[str, Any]) -> dict[str, str]:
    """Return by linear layer what was done instead of what was asked for: by its shape, or for lack of data."""
    starved = {name: own["fallback"] for name, own in facts.get("linears", {}).items() if "fallback" in own}
    return {**facts.get("fallbacks", {}), **starved}


def _candidates(rows: list[dict[str, Any]], picked: str | None) -> Iterator[str]:
    if rows:
        yield f"{'':<2}{'candidate':<24} {'perplexity':>11} {'KL':>9} {'top-1':>7} {'MB':>8} {'seconds':>8}"
    for row in rows:
        name = f"{'* ' if row['name'] == picked else '  '}{row['name']:<24}"
        if "not_done" in row:
            yield f"{name} {row['not_done']}"
            continue
        figures = f"{row['perplexity']:>11.3f} {row['kl_divergence']:>9.5f} {row['top1_agreement']:>7.4f}"
        yield f"{name} {figures} {row['bytes'] / 1e6:>8.1f} {row['seconds']:>8.1f}"


def _allocation(facts: dict[str, Any] | None) -> Iterator[str]:
    if not facts:
        return
    counts = Counter(unit["setting"] for unit in facts["units"].values())
    told = ", ".join(f"{setting} x {count}" for setting, count in sorted(counts.items()))
    yield f"{'':<12} bits:group size by unit: {told}"
    yield (
        f"{'':<12} {facts['bits_per_weight']:.3f} bits per weight, {facts['bytes'] / 1e6:.3f} MB ({facts['size_of']}); "
        f"KL {facts['kl_divergence']:.4g} on {facts['held_back_rows']} held-back rows, predicted "
        f"{facts['predicted_kl']:.4g}"
    )


def _figures(label: str, figures: dict[str, Any]) -> Iterator[str]:
    flat = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    if flat:
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items())
        yield f"{label:<12} {', '.join(parts)}"
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _figures(name, value)
