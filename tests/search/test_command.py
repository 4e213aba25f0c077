"""``olive run`` on a template: what it prints and writes, and how it ends where nothing is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from olive.cli import main
from olive.model import read_manifest

pytestmark = pytest.mark.usefixtures("cache")


def write(model: Path, folder: Path, **changes: Any) -> tuple[str, Path]:
    """Write a template; return its path and the output's."""
    data: dict[str, Any] = {
        "input_model": {"path": str(model)},
        "passes": [{"type": "rtn", "bits": {"choice": [2, 4, 8]}, "group_size": 32, "format": "olive"}],
        "evaluators": {"quality": {"type": "quality", "data": {"max_seq_len": 32, "max_samples": 4}}},
        "goals": ["kl_divergence <= input + 0.2", "size_on_disk minimal"],
        "search": {"sampler": "grid"},
        "verify": {"max_kl": 5},
        "output_dir": str(folder / "out"),
    }
    path = folder / "template.yaml"
    path.write_text(yaml.safe_dump(data | changes), encoding="utf-8")
    return str(path), folder / "out"


def test_trials_are_recorded_neither_in_the_input_nor_in_the_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for study, place in ((model, model), (out, out), (out / "trials", out)):
        path, _ = write(model, tmp_path, search={"study": str(study)})
        assert main(["run", path]) == 2
        assert f"search.study: {study} lies in {place}; choose another folder" in capsys.readouterr().err
        assert not (study / "trials.jsonl").exists()


def test_data_that_is_measured_on_does_not_give_way_to_the_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    text, code = tmp_path / "out" / "own.txt", tmp_path / "out" / "own.py"
    for file, evaluator in (
        (text, {"type": "quality", "data": {"files": [str(text)]}}),
        (code, {"type": "function", "file": str(code), "function": "f", "direction": "minimize"}),
    ):
        file.write_text("f = len")
        path, _ = write(model, tmp_path, evaluators={"own": evaluator}, goals=["size_on_disk minimal"])
        assert main(["run", path, "--overwrite"]) == 2
        assert f"holds {file}, which would be lost" in capsys.readouterr().err


def test_what_could_not_be_measured_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function = {"type": "function", "file": "no.py", "function": "f", "direction": "minimize"}
    for evaluator, told in (
        ({"type": "speed"}, "evaluators.own: speed measures onnx models, and the passes make one of kind hf; add the"),
        ({"type": "quality", "data": {"files": ["no.txt"]}}, "evaluators.own: no.txt: no such file"),
        (function, "evaluators.own: no.py: no such file"),
    ):
        path, _ = write(model, tmp_path, passes=[{"type": "rtn"}], search=None, evaluators={"own": evaluator}, goals=[])
        assert main(["plan", path]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_that_every_library_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    path, _ = write(model, tmp_path, seed=seed)
    assert main(["run", path]) == 2
    assert "seed: input should be" in capsys.readouterr().err


def test_a_template_is_searched_and_the_best_is_laid_out_verified(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(model, tmp_path)
    assert main(["run", path]) == 0
    assert "search       ended by space: no combination is left that was not tried" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert [trial["state"] for trial in report["trials"]] == ["complete"] * 3
    feasible = {trial["values"]["passes.0.bits"]: trial["feasible"] for trial in report["trials"]}
    best = report["trials"][report["best"]]
    assert feasible[8] and not feasible[2]
    assert best["values"]["passes.0.bits"] == min(bits for bits, good in feasible.items() if good)
    assert report["pareto"] == [report["best"]]
    assert [row["met"] for row in report["goals"]] == [True, None]
    assert report["metrics"] == best["metrics"]
    assert report["metrics_source"]["kl_divergence"] == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert set(manifest["bits"].values()) == {best["values"]["passes.0.bits"]}
    assert manifest["verification"]["level"] == "full"
    assert "search" not in manifest["made_by"]["workflow"]
    assert str(tmp_path) not in (out / "olive.json").read_text()

    assert main(["run", path]) == 0  # from the study
    again = json.loads((tmp_path / "out.report.json").read_text())
    assert again["trials"] == report["trials"]
    assert "rtn          cached" in capsys.readouterr().out


def test_dry_run_tells_the_space(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(model, tmp_path)
    assert main(["run", path, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "search     3 combinations",
        "           passes.0.bits: 2, 4, 8",
        f"output     {out}",
    ]
    assert not (tmp_path / "out.study").exists()


def test_a_search_without_a_result_fails_and_its_trials_are_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(model, tmp_path, goals=["kl_divergence <= 1e-12", "size_on_disk minimal"])
    assert main(["run", path, "--trials", "2"]) == 1
    told = capsys.readouterr().err
    assert "no trial meets the hard goals: of 2 complete ones, trial 0 misses kl_divergence <= 1e-12" in told
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (len(report["trials"]), report["best"]) == (2, None)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"passes": [{"type": "lora", "training": {"learning_rate": {"range": [1e-5, 1e-3], "log": True}}}]},
            "passes.0.training.learning_rate: a grid needs a step for this range, or a choice",
        ),
        ({"goals": []}, "goals: a search needs at least one, as in 'kl_divergence minimal'"),
        ({"search": {"proxy": 0.1}, "evaluators": {}}, "search.proxy: no evaluator says how much data it uses"),
        ({"passes": [{"type": "rtn", "bits": {"choice": [4, 5]}}]}, "passes.0.bits: input should be 2, 3, 4 or 8"),
        ({"input_model": {"path": "nowhere"}}, "nowhere"),
    ],
)
def test_mistakes_end_before_any_trial(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    path, _ = write(model, tmp_path, **changes)
    for command in ("run", "plan"):
        assert main([command, path]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out.study").exists()


def test_an_ordinary_workflow_measures_and_judges_too_but_has_nothing_to_search(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write(model, tmp_path, passes=[{"type": "rtn", "bits": 8}])
    assert main(["run", path]) == 2
    assert "search: no option of the workflow is a hole, so there is nothing to search" in capsys.readouterr().err
    data = yaml.safe_load(Path(path).read_text())
    del data["search"]
    Path(path).write_text(yaml.safe_dump(data))
    assert main(["run", path, "--trials", "3"]) == 2
    assert "--trials: no option of the workflow is a hole" in capsys.readouterr().err
    assert main(["run", path]) == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert set(report["metrics"]) == {"perplexity", "kl_divergence", "top1_agreement", "size_on_disk"}
    assert [row["met"] for row in report["goals"]] == [True, None]
    assert report["trials"] == []
