"""The page of a report: whole in itself, harmless whatever the names, and drawn by a browser."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from olive.html import page
from reports import LINEARS, METRICS, search_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><img src=x onerror=\"document.title='taken'\">'\"&<!--"


class Elements(HTMLParser):
    """Collects the elements of a page: name, attributes, and the text right within."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open not in ("script", "style") and data.strip():
            self.texts.append(" ".join(data.split()))  # no-break spaces too


def plain_report(**facts: Any) -> dict[str, Any]:
    """Return the report of a run without anything to plot."""
    step = search_report()["steps"][0] | {"facts": {}}
    return search_report(trials=[], pareto=[], best=None, goals=[], metrics={}, steps=[step]) | facts


def hostile(value: Any) -> Any:
    """Make every text of a report hostile, names too, but for the words that the report itself chooses."""
    if isinstance(value, dict):
        return {name: value[name] if name in ("state", "started", "level") else hostile(value[name]) for name in value}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_what_a_run_has_to_say_is_on_the_page() -> None:
    texts = Elements(page(search_report())).texts
    for text in (
        *("phi", "gptq", "not in the cache", "c0ffee", "12.0 s", "1 min 15 s", "3.0 MB", "-62% from 8.0 MB", "90.0%"),
        *("kl_divergence <= 0.05", "met", "missed", "objective", "size_on_disk", "no space left", "goal missed"),
        *("olive run search.yaml", "olive report models/phi.report.json", "model.safetensors", "lm_head"),
    ):
        assert text in texts, text


def test_candidates_are_compared_and_the_picked_one_stands_out() -> None:
    report = search_report()
    figures = {"perplexity": 10.5, "kl_divergence": 0.03, "top1_agreement": 0.9, "bytes": 2_500_000, "seconds": 90.0}
    tried = [{"name": "hqq", **figures}, {"name": "tune", "not_done": "would not end within 10m"}]
    report["steps"][0]["facts"] |= {"candidates": tried, "picked": "hqq"}
    text = page(report)
    assert '<tr class="picked"><td>hqq</td>' in text
    for said in ("10.5", "2.5 MB", "1 min 30 s", "would not end within 10m"):
        assert said in Elements(text).texts


def test_the_page_asks_for_nothing_outside_itself() -> None:
    elements = Elements(page(search_report())).found
    for tag, attributes in elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys(), (tag, attributes)
    policy = next(a for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy is not None and policy.startswith("default-src 'none'")
    css = (resources.files("olive.html") / "report.css").read_text()
    assert "url(" not in css and "@import" not in css


def test_a_page_without_plots_is_small() -> None:
    assert "Plotly" not in page(plain_report())
    assert len(page(plain_report())) < 30_000
    assert "Plotly" in page(search_report())


def test_names_from_outside_stay_text() -> None:
    report = hostile(search_report())
    report["trials"][0]["values"] = {EVIL: EVIL}
    report["steps"][0]["facts"]["linears"] = {f"layers.0.{EVIL}": {"error": 1.0, "error_rounding": 1.0}}
    report["steps"][0]["facts"]["candidates"] = [{"name": EVIL, "not_done": EVIL}]
    text = page(report)
    elements = Elements(text)
    assert "img" not in {tag for tag, _ in elements.found}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert EVIL in elements.texts
    assert text.count("</script>") == len(re.findall(r"<script\b", text)) == 3
    carried = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)
    assert carried is not None and "onerror" in json.loads(carried[1])["said"]["0"]


def test_reports_of_before_still_make_a_page() -> None:
    fields = ("workflow", "output", "steps", "source_bytes", "output_bytes", "verification", "seconds")
    old = {name: value for name, value in plain_report().items() if name in fields}
    old["steps"] = [{name: value for name, value in old["steps"][0].items() if name != "reason"}]
    assert "phi" in Elements(page(old)).texts


def test_a_search_without_a_result_makes_a_page() -> None:
    texts = Elements(page(search_report(steps=[], best=None, pareto=[], verification={}, output_bytes=0))).texts
    assert "no space left" in texts
    assert "The result was not verified." in texts


def test_numbers_that_are_missing_do_not_stop_the_page() -> None:
    report = search_report()
    report["trials"][0]["metrics"]["my_score"] = None
    report["steps"][0]["facts"]["linears"]["model.layers.0.mlp.up_proj"]["error"] = None
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", page(report), flags=re.DOTALL)


def test_plotly_is_the_published_file_with_its_licence() -> None:
    folder = resources.files("olive.html")
    script = (folder / "plotly-basic.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert b"plotly.js (basic - minified) v4.1.1" in script[:100]
    assert b"</script" not in script
    assert "MIT License" in (folder / "plotly-LICENSE.txt").read_text()


@pytest.fixture
def rendered(tmp_path: Path) -> Any:
    """Return a function that lets a browser open a page and gives the DOM that came of it."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium to open the page, and there is none here")

    def render(text: str) -> str:
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
        argv = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in ended.stderr, ended.stderr  # an error of a script, or a breach of the policy
        return ended.stdout

    return render


def marks(dom: str) -> dict[str, int]:
    """Count the points that each chart of a page has."""
    parts = re.split(r'<div class="chart[^"]*" id="([\w-]+)"', dom)
    return {
        name: len(re.findall(r'<path class="point"', part)) for name, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_a_browser_draws_every_trial_and_every_layer(rendered: Any) -> None:
    dom = rendered(page(search_report()))
    drawn = len(METRICS) + 1  # the chosen trial is marked twice; the input model is hidden at first
    assert marks(dom) == {"tradeoff": drawn, "history": len(METRICS) + 2, "errors-0": 2 * len(LINEARS)}
    assert "size_on_disk (MB)" in dom


def test_another_view_is_drawn_when_it_is_chosen(rendered: Any) -> None:
    choose = (
        '<script>{ const c = document.getElementById("tradeoff-view"); c.selectedIndex = 1;'
        'c.dispatchEvent(new Event("change")); }</script></body>'
    )
    text = page(search_report())
    title = r'<text class="xtitle"[^>]*>([^<]*)</text>'
    assert re.findall(title, rendered(text))[0] == "size_on_disk (MB)"
    assert re.findall(title, rendered(text.replace("</body>", choose)))[0] == "my_score"


def test_hostile_names_do_nothing_in_a_browser(rendered: Any) -> None:
    report = hostile(search_report())
    report["trials"][0]["values"] = {EVIL: EVIL}
    dom = rendered(page(report))
    assert "<img" not in dom
    assert "<title>taken" not in dom
    assert sum(marks(dom).values()) > 0
