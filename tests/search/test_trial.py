"""One trial on real, tiny models: made, measured, dropped early, and never an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olive.cache import Cache
from olive.search.trial import Task, run_trial
from olive.workflow import as_data, read_workflow

pytestmark = pytest.mark.usefixtures("cache")


def task(model: Path, folder: Path, *passes: Any, goals: list[Any], number: int = 0, **more: Any) -> Task:
    quality = {"type": "quality", "data": {"name": "text", "max_seq_len": 32, "max_samples": 8}}
    workflow = {"input_model": {"path": str(model)}, "passes": list(passes), "goals": goals, "output_dir": "none",
                "evaluators": {"quality": quality, "size": {"type": "size"}}}  # fmt: skip
    return Task(number, {}, as_data(read_workflow(workflow)), str(folder), {}, **more)


RTN = {"type": "rtn", "bits": 4, "group_size": 32}
EASY = ["kl_divergence <= 5", "size_on_disk minimal"]


def test_a_trial_lays_nothing_out_and_its_steps_are_in_the_cache(model: Path, tmp_path: Path) -> None:
    trial = run_trial(task(model, tmp_path / "cache", RTN, {"type": "decoder"}, goals=EASY))
    assert (trial.state, trial.reason) == ("complete", None)
    assert set(trial.metrics) == {"perplexity", "kl_divergence", "top1_agreement", "size_on_disk"}
    cache = Cache(tmp_path / "cache")
    entries = [cache.get(key) for key in trial.steps]
    assert [entry.record["pass"] for entry in entries if entry] == ["rtn", "decoder"]
    assert not (tmp_path / "cache" / "trials").exists()
    other = run_trial(task(model, tmp_path / "cache", RTN, {"type": "decoder", "accuracy_level": 0}, goals=EASY))
    assert other.steps[0] == trial.steps[0]  # the prefix is shared
    assert other.metrics["size_on_disk"] != 0


def test_whatever_fails_in_a_trial_is_its_reason_and_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.passes.rtn import Rtn

    def no_memory(*_: object) -> None:
        raise RuntimeError("no memory")

    wanted = task(model, tmp_path, RTN, goals=EASY)
    with monkeypatch.context() as patched:
        patched.setattr(Rtn, "run", no_memory)
        failed = run_trial(wanted)
    assert (failed.state, failed.reason, failed.metrics) == ("failed", "RuntimeError: no memory", {})
    assert Cache(tmp_path).get(failed.steps[0]) is None
    assert run_trial(wanted).state == "complete"


def test_an_interruption_is_not_a_result(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.passes.rtn import Rtn

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rtn, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_trial(task(model, tmp_path, RTN, goals=EASY))


def test_a_candidate_far_from_a_hard_goal_is_dropped_on_part_of_the_data(model: Path, tmp_path: Path) -> None:
    two_bits = {"type": "rtn", "bits": 2, "group_size": 64}
    goals = ["kl_divergence <= 0.05", "size_on_disk minimal"]
    trial = run_trial(task(model, tmp_path, two_bits, goals=goals, proxy=0.25))
    assert trial.state == "pruned"
    assert trial.metrics == {}
    assert trial.proxy["kl_divergence"] > 0.075
    value = f"{trial.proxy['kl_divergence']:.4g}"
    assert trial.reason == f"kl_divergence <= 0.05: is {value} on 25% of the data, which is far off"


def test_a_candidate_far_behind_an_earlier_trial_in_everything_is_dropped(model: Path, tmp_path: Path) -> None:
    goals = ["kl_divergence minimal", "size_on_disk minimal"]
    wanted = task(model, tmp_path, RTN, goals=goals, proxy=0.25)
    own = run_trial(wanted).proxy
    assert own["kl_divergence"] > 0
    better = own | {"kl_divergence": own["kl_divergence"] / 2}
    dropped = run_trial(task(model, tmp_path, RTN, goals=goals, proxy=0.25, rivals=(own, better)))
    told = "kl_divergence minimal, size_on_disk minimal: far behind an earlier trial on 25% of the data"
    assert (dropped.state, dropped.reason) == ("pruned", told)
    larger = better | {"size_on_disk": own["size_on_disk"] + 1}
    assert run_trial(task(model, tmp_path, RTN, goals=goals, proxy=0.25, rivals=(larger,))).state == "complete"
    near = own | {"kl_divergence": own["kl_divergence"] / 1.4}
    assert run_trial(task(model, tmp_path, RTN, goals=goals, proxy=0.25, rivals=(near,))).state == "complete"
