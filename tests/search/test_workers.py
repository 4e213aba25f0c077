"""Workers: the same table wherever trials run, and nothing lost when a worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_trial import EASY, RTN, task

from olive.cache import Cache
from olive.errors import ConfigError, OliveError
from olive.measure import alone, beside_others
from olive.search.study import Found, search
from olive.search.workers import RETRIES, Processes, Ray, open_workers
from olive.workflow import Search

pytestmark = pytest.mark.usefixtures("cache")


def grid(model: Path, folder: Path, **options: Any) -> Found:
    data = {
        "input_model": {"path": str(model)},
        "passes": [RTN | {"bits": {"choice": [4, 8]}, "symmetric": {"choice": [False, True]}}],
        "evaluators": {"quality": {"type": "quality", "data": {"max_seq_len": 32, "max_samples": 4}}},
        "goals": EASY,
        "search": {"sampler": "grid", **options},
        "output_dir": str(folder / "out"),
    }
    return search(data, Cache(folder / "cache"))


def table(found: Found) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.values, {k: pytest.approx(v, rel=1e-5) for k, v in t.metrics.items()})
            for t in found.trials]  # fmt: skip


def test_two_processes_give_the_table_of_one_and_survive_a_kill(model: Path, tmp_path: Path) -> None:
    one = grid(model, tmp_path / "one")
    assert [trial.state for trial in one.trials] == ["complete"] * 4
    killed: list[int] = []

    def kill_one(workers: Processes) -> None:
        numbers = list(workers._numbers.values())
        killed.append(numbers[0].result())
        os.kill(killed[0], signal.SIGKILL)

    start = Processes.__init__

    def start_and_kill(self: Processes, count: int) -> None:
        start(self, count)
        threading.Thread(target=kill_one, args=(self,), daemon=True).start()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Processes, "__init__", start_and_kill)
        two = grid(model, tmp_path / "two", workers=2)
    assert len(killed) == 1
    assert table(two) == [(t.number, t.state, t.values, t.metrics) for t in one.trials]
    assert two.best == one.best


def test_a_trial_whose_worker_dies_each_time_fails_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    workers = Processes(1)
    seen: set[int] = set()
    over = threading.Event()

    def kill_all() -> None:
        while not over.is_set() and len(seen) <= RETRIES:
            for number in list(workers._numbers.values()):
                pid = number.result()
                if pid not in seen:
                    seen.add(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill_all, daemon=True)
    try:
        workers.submit(task(model, tmp_path, RTN, goals=EASY, number=7))
        thread.start()
        (failed,) = workers.wait()
        assert (failed.number, failed.state) == (7, "failed")
        assert failed.reason == "its worker died 3 times, as it does when memory is short"
        over.set()
        thread.join()
        workers.submit(task(model, tmp_path, RTN, goals=EASY, number=8))
        assert [trial.state for trial in workers.wait()] == ["complete"]
    finally:
        over.set()
        workers.close()


def test_workers_end_with_their_search(model: Path, tmp_path: Path) -> None:
    with open_workers(Search(workers=2), lambda *_: None) as workers:
        assert isinstance(workers, Processes)
        pids = [number.result() for number in workers._numbers.values()]
        workers.submit(task(model, tmp_path, RTN, goals=EASY))  # at work while the search ends
    for _ in range(200):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError("a worker lives on")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # also where it ends between the two questions
        return False


def test_speed_is_measured_while_no_trial_computes() -> None:
    events: list[str] = []

    def measure() -> None:
        with alone():
            events.append("measured")

    thread = threading.Thread(target=measure)
    import subprocess
    import sys

    code = (
        "from olive.measure import beside_others\n"
        "with beside_others():\n    print('in', flush=True)\n    input()\nprint('out', flush=True)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "in\n"
    with beside_others():  # another trial may compute meanwhile
        pass
    thread.start()
    time.sleep(0.3)
    assert events == []
    other.stdin.write("\n")
    other.stdin.close()
    thread.join()
    assert events == ["measured"]
    assert other.wait() == 0


@pytest.fixture
def cluster() -> Any:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_ray_cluster_gives_the_table_of_one_process(model: Path, tmp_path: Path) -> None:
    two = grid(model, tmp_path / "ray", workers="ray")
    one = grid(model, tmp_path / "one")
    assert table(two) == [(t.number, t.state, t.values, t.metrics) for t in one.trials]
    told = "search.workers: a trial asks for 3 CPU and 0 GPU, the Ray cluster has 2 CPU and 0 GPU"
    with pytest.raises(ConfigError, match=told):
        Ray(Search(workers="ray", cpus=3))
    with pytest.raises(ConfigError, match=r"a trial asks for 1 CPU and 0.5 GPU, the Ray cluster has 2 CPU and 0 GPU"):
        Ray(Search(workers="ray", gpus=0.5))


@pytest.mark.usefixtures("cluster")
def test_a_ray_worker_that_is_killed_loses_no_trial(model: Path, tmp_path: Path) -> None:
    one = grid(model, tmp_path / "one")
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        """Kill a worker at work, once a trial is finished."""
        journal = tmp_path / "ray" / "out.study" / "trials.jsonl"
        while not (killed or over.is_set()):
            time.sleep(0.01)
            busy = [
                p for p in psutil.process_iter(["cmdline"]) if "ray::run_trial" in " ".join(p.info["cmdline"] or [])
            ]
            if busy and journal.exists() and '"finished"' in journal.read_text():
                busy[0].kill()
                killed.append(busy[0].pid)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    try:
        two = grid(model, tmp_path / "ray", workers="ray")
    finally:
        over.set()
        thread.join()
    assert len(killed) == 1
    assert table(two) == [(t.number, t.state, t.values, t.metrics) for t in one.trials]


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(OliveError, match=r"ray is not installed; run: pip install 'olive-onnx\[distributed\]'"):
        Ray(Search(workers="ray"))
    assert yaml.safe_load("{workers: ray}") == {"workers": "ray"}
