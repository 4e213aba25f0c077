"""What a report shows by layer: the error of each linear as a plotly figure, the bits of each as a grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

COLORS = ("#3b82d6", "#e08a2c", "#1f9d6b", "#a86bd1", "#c7a11a", "#3aa7b5", "#d4679f", "#7d8a4f")
"""Told apart also by people who see few colours, on light and on dark."""
MOST_TICKS = 16
Linears = Mapping[str, Mapping[str, Any]]


def by_place(names: Iterable[str]) -> dict[str, dict[int | None, list[str]]]:
    """Group full names of linears by kind and number of the decoder layer. The experts of a layer are one kind; a name
    without a number has no layer.

    >>> by_place(["layers.0.mlp.experts.1.up_proj", "layers.0.mlp.experts.2.up_proj", "lm_head"])
    {'mlp.experts.*.up_proj': {0: ['layers.0.mlp.experts.1.up_proj', 'layers.0.mlp.experts.2.up_proj']}, \
'lm_head': {None: ['lm_head']}}
    """
    found: dict[str, dict[int | None, list[str]]] = {}
    for name in names:
        at = re.search(r"\.(\d+)\.", name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name[at.end() :]) if at else name
        found.setdefault(kind, {}).setdefault(int(at[1]) if at else None, []).append(name)
    return found


def error_chart(chart: str, linears: Linears) -> dict[str, Any]:
    """Each linear's error as written (line) and as it would be if rounded to nearest (dash); of a layer's experts, the
    worst."""
    traces: list[dict[str, Any]] = []
    for kind, places in by_place(linears).items():
        color = COLORS[len(traces) // 2 % len(COLORS)]
        numbers = sorted(layer for layer in places if layer is not None)
        worst = [_worst(places[layer], linears) for layer in numbers]
        if not worst:
            continue
        texts = [_said(name, len(places[layer]), linears) for name, layer in zip(worst, numbers, strict=True)]
        common: dict[str, Any] = {"x": numbers, "hovertext": texts, "legendgroup": kind}
        look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": color, "width": 2}, "marker": {"size": 7}}
        written = [_positive(linears[name].get("error")) for name in worst]
        traces.append(common | look | {"name": escape(kind), "y": written})
        marker = {"color": color, "size": 9, "symbol": "line-ew-open", "line": {"width": 2}}
        rounded = [_positive(linears[name].get("error_rounding")) for name in worst]
        look = {"mode": "markers", "marker": marker, "showlegend": False}
        traces.append(common | look | {"name": "rounded to nearest", "y": rounded})
    last = max((x for trace in traces for x in trace["x"]), default=0)
    errors = [y for trace in traces for y in trace["y"] if y is not None]
    decades = {"dtick": 1} if errors and max(errors) > 10 * min(errors) else {}
    layout = {
        "xaxis": {"title": {"text": "decoder layer"}, "tickformat": "d", "dtick": max(1, -(-last // MOST_TICKS))},
        "yaxis": {"title": {"text": "relative output error"}, "type": "log", "exponentformat": "power", **decades},
    }
    return {"id": chart, "views": [{"label": "error", "data": traces, "layout": layout}]}


def _worst(members: Sequence[str], linears: Linears) -> str:
    return max(members, key=lambda member: linears[member].get("error") or 0.0)


def _said(name: str, among: int, linears: Linears) -> str:
    lines = [f"worst of {among}"] if among > 1 else []
    lines += [f"{key} {value}" for key, value in linears[name].items()]
    return "<br>".join([f"<b>{escape(name)}</b>", *map(escape, lines)])


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None  # the axis is logarithmic


def bits_grid(bits: Mapping[str, Any], linears: Linears) -> dict[str, Any]:
    """Return rows of cells, a row for each kind of linear and a column for each decoder layer, and what lies outside
    the layers. A cell is ``{text, title, bits}``."""
    places = by_place(bits)
    columns = sorted({layer for row in places.values() for layer in row if layer is not None})
    rows = []
    for kind, row in places.items():
        if set(row) != {None}:
            cells = [_cell(row.get(layer, []), bits, linears) for layer in columns]
            rows.append({"kind": kind, "cells": cells})
    outside = {name: bits[name] for row in places.values() for name in row.get(None, [])}
    return {"columns": columns, "rows": rows, "outside": outside, "counts": _counts(bits)}


def _cell(members: Sequence[str], bits: Mapping[str, Any], linears: Linears) -> dict[str, str]:
    if not members:
        return {"text": "", "title": "", "bits": ""}
    found = sorted({str(bits[name]) for name in members})
    group = linears.get(members[0], {}).get("group_size")
    title = f"{members[0]}: {', '.join(found)}{'' if found == ['float'] else ' bits'}"
    title += f", group size {group}" if group else ""
    title += f", and {len(members) - 1} more" if len(members) > 1 else ""
    texts = ["f" if value == "float" else value for value in found]
    return {"text": "–".join(dict.fromkeys([texts[0], texts[-1]])), "title": title, "bits": found[0]}


def _counts(bits: Mapping[str, Any]) -> dict[str, int]:
    found = sorted(map(str, bits.values()))
    return {value: found.count(value) for value in dict.fromkeys(found)}
