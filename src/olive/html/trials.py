"""The charts of a search as plotly figures: two metrics against each other, and each metric trial by trial.

A chart is ``{id, views}``, a view ``{label, data, layout}``. Points name their trial in ``ids``; what each trial has to
say (:func:`said`) is stored once for all charts. Text from outside is escaped, because plotly reads some HTML in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import combinations
from typing import Any

from olive.evaluate.metrics import METRICS
from olive.report import with_unit

BLUE, ORANGE, GREEN, RED, GREY = "#3b82d6", "#e08a2c", "#1f9d6b", "#d6504a", "#8b95a1"
MOST_METRICS = 6
"""Metrics that can be chosen as axes."""
LOOKS: dict[str, dict[str, Any]] = {
    "goals met": {"color": BLUE, "size": 9, "opacity": 0.8},
    "a goal missed": {"color": GREY, "size": 8, "symbol": "circle-open", "line": {"width": 1.5}},
    "Pareto front": {"color": GREEN, "size": 11},
    "chosen": {"color": ORANGE, "size": 20, "symbol": "star-open", "line": {"width": 2}},
    "input model": {"color": RED, "size": 11, "symbol": "diamond"},
    "failed": {"color": RED, "size": 9, "symbol": "x"},
    "pruned": {"color": ORANGE, "size": 9, "symbol": "triangle-down"},
}
INPUT = "input"
"""Stands for the input model among the numbers of trials."""
Trial = Mapping[str, Any]
Report = Mapping[str, Any]
Point = tuple[str, float | None, float | None]
Better = Callable[[float, float], float]


def metric_names(report: Report) -> list[str]:
    """Return the metrics of the trials, those of the goals first."""
    measured = dict.fromkeys(name for trial in report["trials"] for name in trial["metrics"])
    asked = dict.fromkeys(goal["goal"].split()[0] for goal in report["goals"] if goal["goal"].strip())
    return [*(name for name in asked if name in measured), *(name for name in measured if name not in asked)]


def search_charts(report: Report) -> list[dict[str, Any]]:
    """Return the charts that the trials have figures for."""
    names = metric_names(report)[:MOST_METRICS]
    found = []
    if len(names) > 1:
        views = [tradeoff(report, x, y) for y, x in combinations(names, 2)]
        found.append({"id": "tradeoff", "views": views})
    if names:
        objectives = {goal["goal"].split()[0] for goal in report["goals"] if goal["met"] is None}
        views = [history(report, name) for name in sorted(names, key=lambda name: name not in objectives)]
        found.append({"id": "history", "views": views})
    return found


def said(report: Report) -> dict[str, str]:
    """Return what is shown when a trial is pointed at, by its number, in plotly's HTML."""
    found = {INPUT: "<br>".join(["<b>input model</b>", *_figures(report["metrics_source"])])}
    for trial in report["trials"]:
        remark = ", chosen" if trial["number"] == report["best"] else ""
        remark = ", on the Pareto front" + remark if trial["number"] in report["pareto"] else remark
        lines = [f"<b>trial {trial['number']}</b>{remark}"]
        lines += [f"{escape(name)} = <b>{escape(str(value))}</b>" for name, value in trial["values"].items()]
        lines += _figures(trial["metrics"])
        if trial["reason"]:
            lines.append(escape(trial["reason"]))
        if trial["seconds"] is not None:
            lines.append(f"{trial['seconds']:.1f} s")
        found[str(trial["number"])] = "<br>".join(lines)
    return found


def tradeoff(report: Report, x: str, y: str) -> dict[str, Any]:
    """Two metrics of every finished trial against each other; the search's Pareto front is marked, and a line joins the
    trials that no other beats in these two metrics."""
    done, front = [t for t in report["trials"] if t["state"] == "complete"], set(report["pareto"])
    others = [t for t in done if t["number"] not in front]
    groups = {
        "goals met": [t for t in others if t["feasible"]],
        "a goal missed": [t for t in others if not t["feasible"]],
        "Pareto front": [t for t in done if t["number"] in front],
        "chosen": [t for t in done if t["number"] == report["best"]],
        "input model": [{"number": INPUT, "metrics": report["metrics_source"]}],
    }
    traces = []
    for name, trials in groups.items():
        points = [(str(t["number"]), _value(t, x), _value(t, y)) for t in trials]
        points = sorted((p for p in points if None not in p), key=lambda point: point[1:])
        if points:
            aside = {"visible": "legendonly"} if name == "input model" else {}  # it is far from the trials
            traces.append(_trace(name, points) | aside)
    shown = [trace for trace in traces if trace["name"] != "input model"]
    ways = _better(report, x), _better(report, y)
    if ways[0] and ways[1]:
        edge = undominated([(_value(t, x), _value(t, y)) for t in done], (ways[0], ways[1]))
        look = {"color": GREEN, "width": 1.5, "dash": "dot", "shape": "hv" if ways[0] is min else "vh"}
        traces.insert(0, {"name": "front of the two", "mode": "lines", "hoverinfo": "skip", "line": look,
                          "x": [point[0] for point in edge], "y": [point[1] for point in edge]})  # fmt: skip
    axes = {"xaxis": _axis(x, shown, "x"), "yaxis": _axis(y, shown, "y")}
    shapes = [*_thresholds(report, x, "x"), *_thresholds(report, y, "y")]
    return {"label": f"{y} against {x}", "data": traces, "layout": axes | {"shapes": shapes}}


def history(report: Report, metric: str) -> dict[str, Any]:
    """A metric of each trial in the order of their coming, and the best so far; failed and pruned ones below."""
    groups: dict[str, list[Point]] = {name: [] for name in ("goals met", "a goal missed", "failed", "pruned")}
    for trial in report["trials"]:
        state = trial["state"]
        if state == "complete":
            group, height = "goals met" if trial["feasible"] else "a goal missed", _value(trial, metric)
        else:
            group, height = state, 0.03
        groups.setdefault(group, []).append((str(trial["number"]), float(trial["number"]), height))
    traces = [_trace(name, points) for name, points in groups.items() if points]
    for trace in traces:
        if trace["name"] in ("failed", "pruned"):
            trace |= {"yaxis": "y2", "cliponaxis": False}
    shown = [trace for trace in traces if "yaxis" not in trace]
    best = _best_so_far(report, metric, groups["goals met"])
    if best:
        best.append((max(trial["number"] for trial in report["trials"]), best[-1][1]))
        line = {"name": "best so far", "mode": "lines", "hoverinfo": "skip", "x": [x for x, _ in best],
                "y": [y for _, y in best], "line": {"color": GREEN, "width": 1.5, "shape": "hv"}}  # fmt: skip
        traces.insert(0, line)
    aside = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    layout = {"xaxis": {"title": {"text": "trial"}, "tickformat": "d"}, "yaxis": _axis(metric, shown, "y"),
              "yaxis2": aside, "shapes": list(_thresholds(report, metric, "y"))}  # fmt: skip
    return {"label": metric, "data": traces, "layout": layout}


def _trace(name: str, points: Sequence[Point]) -> dict[str, Any]:
    ids, xs, ys = (list(column) for column in zip(*points, strict=True))
    return {"name": name, "mode": "markers", "marker": LOOKS.get(name, {}), "ids": ids, "x": xs, "y": ys}


def _figures(metrics: Mapping[str, float | None]) -> Iterator[str]:
    return (f"{escape(name)} {escape(with_unit(name, value))}" for name, value in metrics.items() if value is not None)


def unit_of(metric: str) -> tuple[str, float]:
    """Return the unit on an axis, and what a value is multiplied by to be in it."""
    known = METRICS.get(metric.rpartition(".")[2])
    unit = known.unit if known else ""
    return ("MB", 1e-6) if unit == "bytes" else (unit, 1.0)


def _value(trial: Trial, metric: str) -> float | None:
    value = trial["metrics"].get(metric)
    return None if value is None else value * unit_of(metric)[1]


def _axis(metric: str, traces: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Title and scale of an axis; logarithmic where the values span more than 1.5 decades."""
    unit = unit_of(metric)[0]
    values = [value for trace in traces for value in trace[key] if value is not None]
    wide = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    title = {"text": escape(f"{metric} ({unit})" if unit else metric)}
    return {"title": title, "type": "log", "dtick": 1, "exponentformat": "power"} if wide else {"title": title}


def _thresholds(report: Report, metric: str, axis: str) -> Iterator[dict[str, Any]]:
    """Yield a line for each threshold of the metric."""
    across = "y" if axis == "x" else "x"
    for goal in report["goals"]:
        if goal["goal"].split()[0] == metric and goal.get("bound") is not None:
            at = goal["bound"] * unit_of(metric)[1]
            ends = {f"{axis}0": at, f"{axis}1": at, f"{across}0": 0, f"{across}1": 1, f"{across}ref": "paper"}
            label = {"text": escape(goal["goal"]), "textposition": "end", "font": {"size": 11, "color": RED}}
            look = {"type": "line", "layer": "below", "line": {"color": RED, "width": 1, "dash": "dash"}}
            yield {**look, **ends, "label": label}


def undominated(
    points: Sequence[tuple[float | None, float | None]], ways: tuple[Better, Better]
) -> list[tuple[float, float]]:
    """Return, in the order of x, the points that no other beats in one coordinate and equals in the other, or beats in
    both; ``ways`` (min or max) say what is better."""
    whole = sorted({(x, y) for x, y in points if x is not None and y is not None})

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and all(way(a, b) == a for way, a, b in zip(ways, other, point, strict=True))
            for other in whole
        )

    return [point for point in whole if not beaten(point)]


def _best_so_far(report: Report, metric: str, points: Sequence[Point]) -> list[tuple[float, float]]:
    better, found = _better(report, metric), list[tuple[float, float]]()
    for _, x, y in points:
        if better and x is not None and y is not None and (not found or better(y, found[-1][1]) != found[-1][1]):
            found.append((x, y))
    return found


def _better(report: Report, metric: str) -> Better | None:
    """Return min or max, as the metric or a goal says; None where neither does."""
    known = METRICS.get(metric.rpartition(".")[2])
    if known:
        return min if known.direction == "minimize" else max
    goal = next((g["goal"] for g in report["goals"] if g["goal"].split()[:1] == [metric]), "")
    way = re.search(r"minim|maxim|<|>", goal)
    return None if way is None else min if way[0] in ("minim", "<") else max
