"""Reports made up for tests: small enough to check by eye, with everything that a report may tell."""

from __future__ import annotations

from typing import Any

from olive.report import Report, StepRecord

METRICS = {
    0: {"kl_divergence": 0.20, "size_on_disk": 2.0e6, "my_score": 3.0},
    1: {"kl_divergence": 0.04, "size_on_disk": 3.0e6, "my_score": 1.0},
    2: {"kl_divergence": 0.03, "size_on_disk": 4.0e6, "my_score": 2.0},
    5: {"kl_divergence": 0.01, "size_on_disk": 5.0e6, "my_score": 2.5},
    6: {"kl_divergence": 0.02, "size_on_disk": 6.0e6, "my_score": 2.0},
}
"""Of the finished trials; 0 misses the goal, 0, 1, 2 and 5 are the front."""
LINEARS = {
    f"model.layers.{layer}.mlp.{name}": {"bits": bits, "group_size": 32, "error_rounding": 2 * error, "error": error}
    for layer, name, bits, error in ((0, "up_proj", 4, 1e-3), (0, "down_proj", 8, 1e-4), (1, "up_proj", 4, 3e-3))
}


def trial(number: int, **facts: Any) -> dict[str, Any]:
    """Return one trial; a finished one by its figures."""
    metrics = METRICS.get(number, {})
    feasible = bool(metrics) and metrics["kl_divergence"] <= 0.05
    usual = {"number": number, "state": "complete", "values": {"passes.0.bits": number + 2}, "metrics": metrics,
             "feasible": feasible, "reason": None, "seconds": 1.5, "steps": ["ab"]}  # fmt: skip
    return usual | facts


def search_report(**facts: Any) -> dict[str, Any]:
    """Return the report of a search of seven trials; ``facts`` take the place of the usual ones."""
    trials = [trial(number) for number in METRICS]
    trials.insert(3, trial(3, state="failed", reason="no space left"))
    trials.insert(4, trial(4, state="pruned", reason="worse on part of the data", metrics={"kl_divergence": 9.0}))
    step = StepRecord("gptq", "c0ffee", False, 12.0, {"bits": {**dict.fromkeys(LINEARS, 4), "lm_head": "float"},
                      "linears": LINEARS, "fallbacks": {}}, "not in the cache")  # fmt: skip
    report = Report(
        {"input_model": {"path": "folder/phi"}, "passes": [{"type": "gptq", "bits": 4}], "output_dir": "models/phi"},
        "models/phi",
        command="olive run search.yaml",
        started="2026-01-02T03:04:05+00:00",
        steps=[step],
        source_bytes=8_000_000,
        output_bytes=3_000_000,
        sizes={"model.safetensors": 3_000_000},
        verification={"level": "full", "generates": 8, "layers_by_bits": {"4": 3}, "perplexity_source": 10.0,
                      "perplexity": 10.5, "kl_divergence": 0.04, "top1_agreement": 0.9, "tokens": 1024},
        metrics=METRICS[1],
        metrics_source={"kl_divergence": 0.0, "size_on_disk": 8e6},
        goals=[
            {"goal": "kl_divergence <= 0.05", "met": True, "value": 0.04, "bound": 0.05},
            {"goal": "size_on_disk minimal", "met": None, "value": 3e6, "bound": None},
            {"goal": "my_score >= 2", "met": False, "value": 1.0, "bound": 2.0},
        ],
        trials=trials,
        pareto=[0, 1, 2, 5],
        best=1,
        seconds=75.0,
    )  # fmt: skip
    return report.as_data() | facts
