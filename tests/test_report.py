"""What a run says of itself: on the terminal, as JSON, and by ``olive report`` as a page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from olive.cli import main
from olive.report import Report, StepRecord, with_unit
from reports import search_report


def told(**facts: object) -> str:
    data = search_report(**facts)
    steps = [StepRecord(**step) for step in data.pop("steps")]
    return "\n".join(Report(**data, steps=steps).lines())


def test_figures_have_their_units() -> None:
    assert with_unit("size_on_disk", 5.1e6) == "5.1 MB"
    assert with_unit("peak_memory", 2.5e9) == "2.50 GB"
    assert with_unit("size_on_disk", 1234) == "1.2 kB"
    assert with_unit("latency.latency_p50", 12.0) == "12 ms"
    assert with_unit("my_score", 0.25) == "0.25"


def test_metrics_stand_beside_those_of_the_input() -> None:
    assert "size_on_disk 3.0 MB (input 8.0 MB)" in told()
    assert "my_score 1\n" in told()


def test_goals_are_met_missed_or_only_wanted() -> None:
    lines = told().splitlines()
    assert "goal met     kl_divergence <= 0.05 (0.04 nats/token)" in lines
    assert "goal missed  my_score >= 2 (1)" in lines
    assert "objective    size_on_disk minimal (3.0 MB)" in lines


def test_trials_are_counted_and_the_front_is_listed() -> None:
    text = told()
    assert "trials       7: 5 complete, 1 failed, 1 pruned; best 1" in text
    assert "Pareto front 0: kl_divergence 0.2 nats/token, size_on_disk 2.0 MB, my_score 3 (passes.0.bits=2)" in text
    assert "none meets the constraints" in told(best=None)


def test_a_long_front_is_cut() -> None:
    one = search_report()["trials"][0]
    trials = [one | {"number": number} for number in range(12)]
    assert "and 4 more trials on the front; the report lists them" in told(trials=trials, pareto=list(range(12)))


def test_what_is_no_number_is_null_in_the_json(tmp_path: Path) -> None:
    step = StepRecord("rtn", "k", False, 0.1, {"linears": {"a": {"error": math.nan}}, "tuple": (1, math.inf)})
    Report({}, "out", steps=[step]).save(tmp_path / "r.json")
    facts = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)["steps"][0]["facts"]
    assert facts == {"linears": {"a": {"error": None}}, "tuple": [1, None]}


def test_the_page_is_made_again_from_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "phi.report.json"
    source.write_text(json.dumps(search_report()))
    assert main(["report", str(source)]) == 0
    made = tmp_path / "phi.report.html"
    assert capsys.readouterr().out == f"{made}\n"
    first = made.read_text()
    assert main(["report", str(source), "-o", str(tmp_path / "pages" / "phi.html")]) == 0
    assert (tmp_path / "pages" / "phi.html").read_text() == first


def test_a_page_takes_the_place_of_a_page_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, mine = tmp_path / "phi.report.json", tmp_path / "mine.html"
    source.write_text(json.dumps(search_report()))
    mine.write_text("mine")
    argv = ["report", str(source), "-o", str(mine)]
    assert main(argv) == 2
    assert f"{mine}: is in the way of the report and not one of ours" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert main([*argv, "--overwrite"]) == 0
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "not a report"),
        ("{}", "not a report"),
        ("{", "not JSON"),
        ('{"workflow": {}, "output": "o", "steps": [{"name": "rtn"}]}', "steps.0.key: damaged"),
    ],
)
def test_what_is_no_report_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "x.json"
    source.write_text(text)
    assert main(["report", str(source)]) == 2
    assert words in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "give a report" in capsys.readouterr().err
