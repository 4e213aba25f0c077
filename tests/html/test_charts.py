"""The charts' figures: which trial is drawn where, and what it says."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from olive.html.layers import bits_grid, by_place, error_chart
from olive.html.trials import history, metric_names, said, search_charts, tradeoff, undominated
from reports import LINEARS, METRICS, search_report, trial


def traces(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in view["data"]}


def test_metrics_of_goals_come_first() -> None:
    assert metric_names(search_report()) == ["kl_divergence", "size_on_disk", "my_score"]
    assert metric_names(search_report(goals=[{"goal": "my_score >= 2", "met": True, "value": 2.0}]))[0] == "my_score"


def test_every_pair_of_metrics_and_every_metric_can_be_seen() -> None:
    pairs, single = search_charts(search_report())
    assert [view["label"] for view in pairs["views"]] == [
        "kl_divergence against size_on_disk", "kl_divergence against my_score", "size_on_disk against my_score",
    ]  # fmt: skip
    assert [view["label"] for view in single["views"]] == ["size_on_disk", "kl_divergence", "my_score"]
    assert search_charts(search_report(trials=[], pareto=[], best=None)) == []


def test_each_finished_trial_is_a_point_of_its_kind() -> None:
    drawn = traces(tradeoff(search_report(), "size_on_disk", "kl_divergence"))
    where = {name: list(zip(t["ids"], t["x"], t["y"], strict=True)) for name, t in drawn.items() if "ids" in t}
    assert where == {
        "goals met": [("6", 6.0, 0.02)],
        "Pareto front": [("0", 2.0, 0.20), ("1", 3.0, 0.04), ("2", 4.0, 0.03), ("5", 5.0, 0.01)],
        "chosen": [("1", 3.0, 0.04)],
        "input model": [("input", 8.0, 0.0)],
    }
    missed = search_report(pareto=[1, 2, 5])
    assert traces(tradeoff(missed, "size_on_disk", "kl_divergence"))["a goal missed"]["ids"] == ["0"]


def test_a_line_joins_what_no_trial_beats_in_the_two_metrics_shown() -> None:
    line = traces(tradeoff(search_report(), "size_on_disk", "kl_divergence"))["front of the two"]
    assert (line["x"], line["y"]) == ([2.0, 3.0, 4.0, 5.0], [0.20, 0.04, 0.03, 0.01])
    unknown = search_report(goals=[])  # nothing tells whether more or less of my_score is better
    assert "front of the two" not in traces(tradeoff(unknown, "my_score", "kl_divergence"))


@pytest.mark.parametrize("ways", list(product((min, max), repeat=2)))
def test_undominated_points_are_those_that_nothing_beats(ways: tuple[Any, Any]) -> None:
    rng = random.Random(0)
    points = [(float(rng.randrange(9)), float(rng.randrange(9))) for _ in range(40)]
    signs = [1 if way is min else -1 for way in ways]
    costs = {point: tuple(s * v for s, v in zip(signs, point, strict=True)) for point in points}
    slow = {
        p for p, (a, b) in costs.items()
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs.values())
    }  # fmt: skip
    assert undominated([*points, (None, 1.0)], ways) == sorted(slow)


def test_a_threshold_is_a_line_in_the_unit_of_its_axis() -> None:
    goals = [{"goal": "size_on_disk <= 4 MB", "met": True, "value": 3e6, "bound": 4e6}]
    (line,) = tradeoff(search_report(goals=goals), "size_on_disk", "kl_divergence")["layout"]["shapes"]
    assert (line["x0"], line["x1"], line["yref"]) == (4.0, 4.0, "paper")
    (line,) = history(search_report(), "kl_divergence")["layout"]["shapes"]
    assert (line["y0"], line["y1"], line["label"]["text"]) == (0.05, 0.05, "kl_divergence &lt;= 0.05")
    assert history(search_report(), "size_on_disk")["layout"]["shapes"] == []


def test_the_best_so_far_is_of_trials_that_meet_the_goals() -> None:
    for metric, best in (("kl_divergence", min), ("my_score", max)):
        line = traces(history(search_report(), metric))["best so far"]
        met = [number for number in METRICS if number != 0]
        for number in met:
            slow = best(METRICS[n][metric] for n in met if n <= number)
            shown = [y for x, y in zip(line["x"], line["y"], strict=True) if x <= number][-1]
            assert shown == slow, (metric, number)
        assert line["x"][-1] == 6


def test_failed_and_pruned_trials_have_a_place_but_no_value() -> None:
    drawn = traces(history(search_report(), "kl_divergence"))
    assert (drawn["failed"]["x"], drawn["pruned"]["x"]) == ([3.0], [4.0])
    assert {drawn[name]["yaxis"] for name in ("failed", "pruned")} == {"y2"}
    assert drawn["goals met"]["ids"] == ["1", "2", "5", "6"]
    assert drawn["a goal missed"]["ids"] == ["0"]


def test_wide_ranges_get_logarithmic_axes() -> None:
    wide = [trial(0), trial(1, metrics={"kl_divergence": 1e-4, "size_on_disk": 2e6})]
    axes = [tradeoff(search_report(trials=t), "size_on_disk", "kl_divergence")["layout"] for t in ([trial(0)], wide)]
    assert [axis["yaxis"].get("type") for axis in axes] == [None, "log"]


def test_a_trial_says_its_values_figures_and_reason() -> None:
    texts = said(search_report())
    assert texts["1"].split("<br>") == [
        "<b>trial 1</b>, on the Pareto front, chosen", "passes.0.bits = <b>3</b>", "kl_divergence 0.04 nats/token",
        "size_on_disk 3.0 MB", "my_score 1", "1.5 s",
    ]  # fmt: skip
    assert "no space left" in texts["3"]
    evil = said(search_report(trials=[trial(0, values={"<a href='x'>": "<img src=x>"}, reason="<b>&")]))["0"]
    assert "<a" not in evil and "<img" not in evil and "&lt;img src=x&gt;" in evil and "&lt;b&gt;&amp;" in evil


def test_linears_are_grouped_by_kind_and_layer() -> None:
    names = ["m.layers.0.mlp.experts.1.up", "m.layers.0.mlp.experts.2.up", "m.layers.10.mlp.experts.1.up", "lm_head"]
    assert by_place(names) == {
        "mlp.experts.*.up": {0: names[:2], 10: names[2:3]},
        "lm_head": {None: ["lm_head"]},
    }


def test_the_error_of_a_layer_s_experts_is_that_of_the_worst() -> None:
    linears = {
        f"m.layers.0.experts.{i}.up": {"error": e, "error_rounding": 2 * e} for i, e in enumerate((1.0, 3.0, 2.0))
    }
    written, rounded = error_chart("e", linears)["views"][0]["data"]
    assert (written["x"], written["y"], rounded["y"]) == ([0], [3.0], [6.0])
    assert "experts.1.up" in written["hovertext"][0] and "worst of 3" in written["hovertext"][0]


def test_errors_that_were_not_seen_or_are_zero_are_left_out() -> None:
    linears = {f"m.layers.{i}.up": {"error": e, "error_rounding": None} for i, e in enumerate((0.0, None, 0.5))}
    written, rounded = error_chart("e", linears)["views"][0]["data"]
    assert (written["y"], rounded["y"]) == ([None, None, 0.5], [None, None, None])


def test_the_grid_has_a_cell_for_each_kind_and_layer() -> None:
    bits = {name: own["bits"] for name, own in LINEARS.items()} | {"lm_head": "float"}
    grid = bits_grid(bits, LINEARS)
    assert grid["columns"] == [0, 1]
    cells = {row["kind"]: [cell["text"] for cell in row["cells"]] for row in grid["rows"]}
    assert cells == {"mlp.up_proj": ["4", "4"], "mlp.down_proj": ["8", ""]}
    assert grid["rows"][0]["cells"][0]["title"] == "model.layers.0.mlp.up_proj: 4 bits, group size 32"
    assert (grid["outside"], grid["counts"]) == ({"lm_head": "float"}, {"4": 2, "8": 1, "float": 1})


def test_experts_of_several_bits_share_a_cell() -> None:
    bits = {"m.layers.0.experts.0.up": 2, "m.layers.0.experts.1.up": 4, "m.layers.0.experts.2.up": 4}
    (cell,) = bits_grid(bits, {})["rows"][0]["cells"]
    assert (cell["text"], cell["title"]) == ("2–4", "m.layers.0.experts.0.up: 2, 4 bits, and 2 more")
