"""One self-contained HTML page from a report: no file beside it, nothing from the network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from olive.config import dump
from olive.html.layers import bits_grid, error_chart
from olive.html.trials import said, search_charts, unit_of
from olive.report import GOAL_STATES, Report, all_fallbacks, with_unit

PLAIN = (str, int, float, bool)


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report, given as the data that :meth:`Report.save` writes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    report = _complete(report)
    charts = [*search_charts(report), *_error_charts(report)]
    environment = Environment(
        loader=PackageLoader("olive", "html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bytes": _bytes, "seconds": _seconds, "figure": _figure}
    text = environment.get_template("report.html").render(
        report=report,
        name=Path(report["output"]).name,
        started=report["started"].replace("T", " ").replace("+00:00", " UTC"),
        source=_source(report),
        tiles=list(_tiles(report)),
        goals=list(_goals(report)),
        metrics=list(_metrics(report)),
        trials=list(_trials(report)),
        holes=_names(report["trials"], "values"),
        trial_metrics={name: unit_of(name) for name in _names(report["trials"], "metrics")},
        steps=[_step(step, work) for step, work in zip(report["steps"], report["workflow"]["passes"], strict=False)],
        bits=_bits(report),
        compared=dict(_compared(report["verification"])),
        commands=list(_commands(report)),
        workflow=dump(report["workflow"]),
        lock=json.dumps(report["lock"], indent=1, ensure_ascii=False),
        chart_ids={chart["id"]: [view["label"] for view in chart["views"]] for chart in charts},
        charts={"charts": charts, "said": said(report)},
        css=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
        plotly=Markup(_asset("plotly-basic.min.js")) if charts else "",
    )
    return text + "\n"


def _asset(name: str) -> str:
    return (resources.files("olive.html") / name).read_text(encoding="utf-8")


def _complete(report: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what an older report does not tell."""
    empty = Report({}, "").as_data()
    steps = [{"reason": "", **step} for step in report["steps"]]
    return {**empty, **report, "steps": steps}


def _source(report: Mapping[str, Any]) -> dict[str, Any]:
    given = report["workflow"]["input_model"]
    locked = report["lock"].get("source", {})
    return {"path": given["path"], "model": locked.get("model", Path(given["path"]).name),
            "revision": locked.get("revision"), "digest": locked.get("digest")}  # fmt: skip


def _tiles(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield label, figure and remark of what matters most."""
    before, after = report["source_bytes"], report["output_bytes"]
    yield "size", _bytes(after), f"{after / before - 1:+.0%} from {_bytes(before)}" if before else ""
    found = report["verification"]
    if "kl_divergence" in found:
        yield "KL divergence", _figure(found["kl_divergence"]), "nats per token, in verification"
        yield "top-1 agreement", f"{found['top1_agreement']:.1%}", "with the source, in verification"
        yield "perplexity", _figure(found["perplexity"]), f"source {_figure(found['perplexity_source'])}"
    if report["goals"]:
        judged = [goal["met"] for goal in report["goals"] if goal["met"] is not None]
        yield "goals met", f"{sum(judged)} of {len(judged)}", ""
    if report["trials"]:
        done = sum(trial["state"] == "complete" for trial in report["trials"])
        yield "trials", str(len(report["trials"])), f"{done} complete"
    cached = sum(step["cached"] for step in report["steps"])
    yield "time", _seconds(report["seconds"]), f"{cached} of {len(report['steps'])} steps from the cache"


def _goals(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for goal in report["goals"]:
        value = goal["value"]
        shown = "" if value is None else with_unit(goal["goal"].split()[0], value)
        yield {"goal": goal["goal"], "state": GOAL_STATES[goal["met"]].removeprefix("goal "), "value": shown}


def _metrics(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in {**report["metrics"], **report["metrics_source"]}:
        value, source = report["metrics"].get(name), report["metrics_source"].get(name)
        change = f"{value / source - 1:+.1%}" if source and value is not None else ""
        shown = {"value": value, "source": source}
        yield {"name": name, "change": change,
               **{key: "" if figure is None else with_unit(name, figure) for key, figure in shown.items()}}  # fmt: skip


def _trials(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the trials, the chosen one and the Pareto front first."""
    front = set(report["pareto"])
    rank = {number: place for place, number in enumerate([report["best"], *report["pareto"]])}
    for trial in sorted(report["trials"], key=lambda t: (rank.get(t["number"], len(rank)), t["number"])):
        state = trial["state"]
        if state == "complete":
            state = "goal missed" if not trial["feasible"] else "on the front" if trial["number"] in front else state
        state = "chosen" if trial["number"] == report["best"] else state
        figures = {name: value * unit_of(name)[1] for name, value in trial["metrics"].items() if value is not None}
        yield {**trial, "state": state, "metrics": figures}


def _names(trials: list[dict[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial[part]))


def _step(step: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
    facts = step["facts"]
    plain = {name: value for name, value in facts.items() if isinstance(value, PLAIN)}
    options = dict(_flat({name: value for name, value in work.items() if name != "type"}))
    return {**step, "facts": plain, "options": options, "fallbacks": all_fallbacks(facts),
            "candidates": facts.get("candidates") or [], "picked": facts.get("picked")}  # fmt: skip


def _flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options with their dotted names, without those that say nothing."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif value not in (None, []):
            yield above + name, ", ".join(map(_figure, value)) if isinstance(value, list) else value


def _error_charts(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for i, step in enumerate(report["steps"]):
        if any("error" in own for own in step["facts"].get("linears", {}).values()):
            yield error_chart(f"errors-{i}", step["facts"]["linears"])


def _bits(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the bits that the result has: those of the last step that tells them."""
    told = [step["facts"]["bits"] for step in report["steps"] if step["facts"].get("bits")]
    linears = {name: own for step in report["steps"] for name, own in step["facts"].get("linears", {}).items()}
    return bits_grid(told[-1], linears) if told else None


def _compared(verification: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what was compared with its source, the result and each adapter, with the figures."""
    parts = {"result": verification, **{name: part for name, part in verification.items() if isinstance(part, dict)}}
    return ((name, part) for name, part in parts.items() if "kl_divergence" in part)


def _commands(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report["command"]:
        yield "This run", report["command"]
    if report["lock"]:
        yield "Do it again, and compare every byte", shlex.join(["olive", "reproduce", f"{report['output']}.lock.json"])
    yield "Make this page again", shlex.join(["olive", "report", f"{report['output']}.report.json"])


def _bytes(count: float) -> str:
    return with_unit("size_on_disk", count).replace(" ", "\N{NO-BREAK SPACE}")


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", "\\n")
