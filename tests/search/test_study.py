"""What a search promises: no point twice, an end, the same again, nothing lost, and the right one best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from searching import Fake, Stop, run, template

from olive.errors import ConfigError
from olive.search.study import Found

SAMPLERS = ["tpe", "gp", "random", "grid", "nsga2", "qmc"]
RTN = {"type": "rtn", "bits": {"choice": [2, 3, 4, 8]}, "group_size": {"choice": [32, 64]},
       "symmetric": {"choice": [False, True]}}  # fmt: skip
GOALS = ["kl_divergence <= 0.1", "size_on_disk minimal"]
CONDITIONAL = [
    {"type": "rtn", "bits": {"choice": [2, 4, 8]}},
    {"type": "hqq", "bits": {"choice": [4, 8]}, "group_size": {"choice": [32, 64]}},
    None,
]


def figures(values: dict[str, Any]) -> dict[str, float]:
    """A made-up model: more bits and smaller groups are larger and nearer to the source."""
    bits, group = values["passes.0.bits"], values["passes.0.group_size"]
    kl = 4.0**-bits * (1 + group / 64) * (1.5 if values.get("passes.0.symmetric") else 1) * 8
    return {"kl_divergence": kl, "size_on_disk": bits * 1e6 + 16e6 / group}


def key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def tried(found: Found) -> list[str]:
    return [key(trial.values) for trial in found.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_spent_space_ends_the_search_and_no_point_is_tried_twice(model: Path, tmp_path: Path, sampler: str) -> None:
    data = template(model, RTN, goals=GOALS, sampler=sampler, trials=1000)
    found = run(data, Fake(figures), tmp_path)
    assert found.ended == "space: no combination is left that was not tried"
    assert len(tried(found)) == len(set(tried(found))) == 16
    feasible = [t for t in found.trials if figures(t.values)["kl_divergence"] <= 0.1]
    smallest = min(feasible, key=lambda t: figures(t.values)["size_on_disk"])
    assert found.best is not None
    assert figures(found.trials[found.best].values)["size_on_disk"] == figures(smallest.values)["size_on_disk"]
    assert found.trials[found.best].feasible


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditional_spaces_are_spent_too_and_equal_workflows_count_once(
    model: Path, tmp_path: Path, sampler: str
) -> None:
    again = [*CONDITIONAL, {"type": "rtn", "bits": {"choice": [4, 3]}}]  # 4 bits are there already
    data = template(model, again, {"type": "rotate"}, goals=["size_on_disk minimal"], sampler=sampler, trials=1000)
    data["passes"] = [{"type": "rotate"}, again, {"type": "decoder"}]
    found = run(data, Fake(lambda values: {"size_on_disk": len(key(values))}), tmp_path)
    assert len(found.trials) == 3 + 4 + 1 + 1
    assert len(set(tried(found))) == 9


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_seed_gives_the_same_trials(model: Path, tmp_path: Path, sampler: str, workers: int) -> None:
    data = template(model, RTN, goals=GOALS, sampler=sampler, trials=14, seed=5)
    one = run(data, Fake(figures, workers), tmp_path / "one")
    two = run(data, Fake(figures, workers), tmp_path / "two")
    assert tried(one) == tried(two)
    assert len(one.trials) == 14
    if sampler != "grid":
        other = run(data | {"seed": 6}, Fake(figures, workers), tmp_path / "three")
        assert tried(other) != tried(one)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_search_goes_on_as_if_it_had_not_stopped(
    model: Path, tmp_path: Path, sampler: str, workers: int
) -> None:
    data = template(model, RTN, goals=GOALS, sampler=sampler, trials=14)
    whole = run(data, Fake(figures, workers), tmp_path / "whole")
    done: list[int] = []
    for stop_after in (0, 4, 1, 3):
        killed = Fake(figures, workers, stop_after)
        with pytest.raises(Stop):
            run(data, killed, tmp_path / "killed")
        done += killed.done
    last = Fake(figures, workers)
    resumed = run(data, last, tmp_path / "killed")
    assert tried(resumed) == tried(whole)
    assert [t.metrics for t in resumed.trials] == [t.metrics for t in whole.trials]
    assert sorted(done + last.done) == list(range(14))  # none was done twice
    assert resumed.best == whole.best


def test_a_line_that_a_kill_cut_off_is_dropped(model: Path, tmp_path: Path) -> None:
    data = template(model, RTN, goals=GOALS, trials=6)
    whole = run(data, Fake(figures), tmp_path / "whole")
    log = (tmp_path / "whole" / "study" / "trials.jsonl").read_bytes()
    for cut in (len(log) - 1, len(log) - 200, log.index(b"\n") + 5):
        place = tmp_path / f"cut-{cut}" / "study"
        place.mkdir(parents=True)
        (place / "trials.jsonl").write_bytes(log[:cut])
        assert tried(run(data, Fake(figures), place.parent)) == tried(whole)


def test_a_search_may_go_on_with_other_limits_and_workers_but_not_as_another_search(
    model: Path, tmp_path: Path
) -> None:
    data = template(model, RTN, goals=GOALS, trials=5)
    first = run(data, Fake(figures), tmp_path)
    more = run(data | {"search": {"trials": 9, "workers": 2}}, Fake(figures, 2), tmp_path)
    assert tried(more)[:5] == tried(first)
    assert len(set(tried(more))) == 9
    told = "study: holds trials of another search .seed differ.; delete the folder, or name another one"
    with pytest.raises(ConfigError, match=told):
        run(data | {"seed": 1}, Fake(figures), tmp_path)
    with pytest.raises(ConfigError, match=r"another search .evaluators, sampler, template differ."):
        run(data | {"search": {"sampler": "qmc"}, "goals": GOALS[1:]}, Fake(figures), tmp_path)


@pytest.mark.parametrize("what", ["text", "function"])
def test_a_study_that_was_measured_otherwise_is_refused(model: Path, tmp_path: Path, what: str) -> None:
    """Its figures and new ones could not be compared."""
    file = tmp_path / "own.py"
    own = {
        "text": {"type": "quality", "data": {"files": [str(file)]}},
        "function": {"type": "function", "file": str(file), "function": "graphs", "direction": "minimize"},
    }
    data = template(model, RTN, goals=GOALS, trials=2) | {"evaluators": {"own": own[what]}}
    file.write_text("one")
    run(data, Fake(figures), tmp_path)
    run(data, Fake(figures), tmp_path)
    file.write_text("two")
    with pytest.raises(ConfigError, match=r"another search .evaluators differ."):
        run(data, Fake(figures), tmp_path)


def test_a_study_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    data = template(model, RTN, goals=GOALS, trials=2)
    found = run(data, Fake(figures), tmp_path)
    log = tmp_path / "study" / "trials.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines[1:]:
        if "trial" in line:
            line["trial"]["steps"] = ["0" * 64]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert found.trials
    with pytest.raises(ConfigError, match=r"trial 0 was made from another model, other data or by another version"):
        run(data, Fake(figures), tmp_path)


def test_failed_trials_are_recorded_with_their_reason_and_never_ranked(model: Path, tmp_path: Path) -> None:
    def some_fail(values: dict[str, Any]) -> dict[str, float] | str:
        bits = values["passes.0.bits"]
        if bits == 8:
            return "RuntimeError: no memory"
        if bits == 2:
            return {"size_on_disk": 1.0}  # the smallest, but without its kl_divergence
        if bits == 3:
            return {"size_on_disk": math.nan, "kl_divergence": 0.0}
        return figures(values)

    for order in ("joint", "pass_by_pass"):
        data = template(
            model, RTN, goals=["kl_divergence minimal", "size_on_disk minimal"], sampler="grid", order=order
        )
        found = run(data, Fake(some_fail), tmp_path / order)
        reasons = {t.values["passes.0.bits"]: t.reason for t in found.trials if t.state == "failed"}
        assert reasons == {
            8: "RuntimeError: no memory",
            2: "kl_divergence: was not measured, but a goal asks for it",
            3: "size_on_disk: is nan, not a finite number",
        }
        assert found.best is not None
        assert found.trials[found.best].values["passes.0.bits"] == 4
        assert {found.trials[n].values["passes.0.bits"] for n in found.pareto} == {4}
        again = run(data, Fake(some_fail), tmp_path / order)  # from the study alone
        assert [(t.state, t.reason) for t in again.trials] == [(t.state, t.reason) for t in found.trials]


def test_a_search_where_all_fail_has_no_best(model: Path, tmp_path: Path) -> None:
    data = template(model, RTN, goals=GOALS, trials=3)
    found = run(data, Fake(lambda _: "RuntimeError: no"), tmp_path)
    assert (found.best, found.pareto, found.workflow) == (None, [], {})
    assert [trial.state for trial in found.trials] == ["failed"] * 3


def test_combinations_that_are_not_valid_fail_without_work_and_do_not_count(model: Path, tmp_path: Path) -> None:
    step = {"type": "rtn", "bits": {"choice": [4, 8]}, "format": {"choice": ["awq", "gptq"]}}
    data = template(model, step, goals=["size_on_disk minimal"], sampler="grid", trials=3)
    workers = Fake(lambda values: {"size_on_disk": float(values["passes.0.bits"])})
    found = run(data, workers, tmp_path)
    assert len(found.trials) == 4
    failed = next(trial for trial in found.trials if trial.state == "failed")
    assert failed.values == {"passes.0.bits": 8, "passes.0.format": "awq"}
    assert "the awq layout does not hold 8 bits" in str(failed.reason)
    assert failed.number not in workers.done


def test_passes_that_do_not_follow_on_each_other_are_not_valid_either(model: Path, tmp_path: Path) -> None:
    data = template(model, [{"type": "decoder"}, {"type": "rtn"}], [{"type": "hqq"}, None], sampler="grid",
                    goals=["size_on_disk minimal"])  # fmt: skip
    found = run(data, Fake(lambda _: {"size_on_disk": 1.0}), tmp_path)
    by_values = {(t.values["passes.0"], t.values["passes.1"]): t for t in found.trials}
    assert {pair for pair, trial in by_values.items() if trial.state == "complete"} == {
        ("decoder", "none"), ("rtn", "none"), ("rtn", "hqq")
    }  # fmt: skip
    assert by_values["decoder", "hqq"].reason == "passes.1: hqq works on hf models, but gets onnx"


def test_no_goal_met_means_no_best_and_the_trials_say_what_they_miss(model: Path, tmp_path: Path) -> None:
    data = template(model, RTN, goals=["kl_divergence <= 1e-9", "size_on_disk minimal"], trials=4)
    found = run(data, Fake(figures), tmp_path)
    assert found.best is None
    assert {trial.reason for trial in found.trials} == {"misses kl_divergence <= 1e-09"}


def test_stop_on_goals_ends_the_search(model: Path, tmp_path: Path) -> None:
    data = template(model, RTN, goals=GOALS, sampler="grid", stop_on_goals=True)
    found = run(data, Fake(figures), tmp_path / "asked")
    assert found.ended == "goals: a trial meets them"
    assert [trial.feasible for trial in found.trials] == [False] * (len(found.trials) - 1) + [True]
    alone = run(template(model, RTN, goals=GOALS[:1], sampler="grid"), Fake(figures), tmp_path / "alone")
    assert tried(alone) == tried(found)  # without an objective nothing better can come


def test_time_ends_the_search_and_counts_over_a_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("olive.search.study.time.monotonic", lambda: clock[0])

    def slow(values: dict[str, Any]) -> dict[str, float]:
        clock[0] += 10
        return figures(values)

    data = template(model, RTN, goals=GOALS, time="35s")
    with pytest.raises(Stop):
        run(data, Fake(slow, stop_after=2), tmp_path)
    clock[0] += 1000  # nobody was searching
    found = run(data, Fake(slow), tmp_path)
    assert found.ended == "time: 35s are over"
    assert len(found.trials) == 4


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_pass_by_pass_searches_the_sum_of_the_passes_and_keeps_the_best_of_each(
    model: Path, tmp_path: Path, sampler: str
) -> None:
    two = {"type": "decoder", "accuracy_level": {"choice": [0, 4]}, "lm_head": {"choice": ["float", "int8", "int4"]}}

    def both(values: dict[str, Any]) -> dict[str, float]:
        found = figures(values)
        saved = {"float": 0, "int8": 2e6, "int4": 3e6}[values["passes.1.lm_head"]]
        return {
            "kl_divergence": found["kl_divergence"] * (1 + saved / 1e6),
            "size_on_disk": found["size_on_disk"] - saved,
        }

    data = template(model, RTN, two, goals=GOALS, sampler=sampler, order="pass_by_pass", trials=1000)
    found = run(data, Fake(both), tmp_path)
    assert len(found.trials) == 16 + 6 - 1  # the second pass's first values were tried with the first pass's best
    first = found.trials[:16]
    assert {(t.values["passes.1.accuracy_level"], t.values["passes.1.lm_head"]) for t in first} == {(0, "float")}
    feasible = [t for t in first if t.feasible]
    leader = min(feasible, key=lambda t: (t.metrics["size_on_disk"], t.number))
    chosen = {path: value for path, value in leader.values.items() if path.startswith("passes.0")}
    for trial in found.trials[16:]:
        assert {path: value for path, value in trial.values.items() if path.startswith("passes.0")} == chosen
    assert found.best is not None
    assert found.trials[found.best].metrics["size_on_disk"] <= leader.metrics["size_on_disk"]


def test_a_killed_search_pass_by_pass_goes_on_with_the_pass_it_was_at(model: Path, tmp_path: Path) -> None:
    two = {"type": "decoder", "accuracy_level": {"choice": [0, 4]}, "lm_head": {"choice": ["float", "int8", "int4"]}}
    data = template(model, RTN, two, goals=GOALS, order="pass_by_pass", trials=12)
    whole = run(data, Fake(figures, 2), tmp_path / "whole")
    for stop_after in (3, 5):
        with pytest.raises(Stop):
            run(data, Fake(figures, 2, stop_after), tmp_path / "killed")
    last = Fake(figures, 2)
    assert tried(run(data, last, tmp_path / "killed")) == tried(whole)
    assert len(last.done) == len(whole.trials) - 8


def test_two_processes_do_not_run_one_study(model: Path, tmp_path: Path) -> None:
    from olive.search.journal import open_journal

    data = template(model, RTN, goals=GOALS, trials=1)
    with (
        open_journal(tmp_path / "study", {}),
        pytest.raises(ConfigError, match="study: another process is running this search"),
    ):
        run(data, Fake(figures), tmp_path)
