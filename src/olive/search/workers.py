"""Who does the trials: this process, several local ones, or a Ray cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

from olive.engine import Progress
from olive.errors import ConfigError, OliveError, require
from olive.search.trial import Task, Trial, run_trial
from olive.workflow import Search

RETRIES = 2
"""Times that a trial is tried again whose worker died."""


class Workers(Protocol):
    """Runs tasks; what is finished is fetched with :meth:`wait`."""

    count: int
    """Trials that run at once."""

    def submit(self, task: Task) -> None:
        """Have a trial done."""

    def wait(self) -> list[Trial]:
        """Return trials that are finished, at least one of those submitted."""


@contextmanager
def open_workers(options: Search, progress: Progress) -> Iterator[Workers]:
    """Start the workers that the search asks for; end them afterwards, whatever they are doing."""
    if options.workers == 1:
        yield Here(progress)
        return
    workers = Processes(options.workers) if isinstance(options.workers, int) else Ray(options)
    try:
        yield workers
    finally:
        workers.close()


class Here:
    """One trial after the other in this process."""

    count = 1

    def __init__(self, progress: Progress) -> None:
        self._tasks: deque[Task] = deque()
        self._progress = progress

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self) -> list[Trial]:
        return [run_trial(self._tasks.popleft(), self._progress)]


class Processes:
    """Local processes, each a pool of its own, so that one that dies takes only its own trial with it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = max(1, (os.cpu_count() or 1) // count)
        self._numbers: dict[ProcessPoolExecutor, Future[int]] = {}
        self._free = [self._start() for _ in range(count)]
        self._waiting: deque[tuple[Task, int]] = deque()
        self._busy: dict[Future[Trial], tuple[Task, int, ProcessPoolExecutor]] = {}

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")  # torch's threads do not survive a fork
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(self._threads,))
        self._numbers[pool] = pool.submit(os.getpid)
        return pool

    def submit(self, task: Task) -> None:
        self._waiting.append((task, 0))
        self._assign()

    def _assign(self) -> None:
        while self._free and self._waiting:
            (task, tries), pool = self._waiting.popleft(), self._free.pop()
            self._busy[pool.submit(run_trial, task)] = task, tries, pool

    def wait(self) -> list[Trial]:
        found: list[Trial] = []
        while not found:
            done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
            for future in done:
                task, tries, pool = self._busy.pop(future)
                try:
                    found.append(future.result())
                    self._free.append(pool)
                except BrokenProcessPool:
                    pool.shutdown(wait=False)
                    del self._numbers[pool]
                    self._free.append(self._start())
                    if tries < RETRIES:
                        self._waiting.appendleft((task, tries + 1))
                    else:
                        found.append(died(task))
            self._assign()
        return found

    def close(self) -> None:
        """End the processes; those at work are terminated."""
        for pool, number in self._numbers.items():
            pool.shutdown(wait=False, cancel_futures=True)
            if number.done() and not number.cancelled() and number.exception() is None:
                with suppress(ProcessLookupError):
                    os.kill(number.result(), signal.SIGTERM)


def _begin(threads: int) -> None:
    """Prepare a worker: Ctrl-C is the parent's business, the workers share the cores, and none outlives the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def died(task: Task) -> Trial:
    """Return the trial of a task whose workers died."""
    reason = f"its worker died {RETRIES + 1} times, as it does when memory is short"
    return Trial(task.number, task.values, reason=reason)


class Ray:
    """A Ray cluster: each trial is a task with its request for cores and GPUs. All nodes must see the folders of the
    cache, the model and the data."""

    def __init__(self, options: Search) -> None:
        self._ray: Any = require("ray", "distributed")
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._connect(str(options.workers))
        total = self._ray.cluster_resources()
        self.count = int(total.get("CPU", 0) // options.cpus)
        if options.gpus:
            self.count = min(self.count, int(total.get("GPU", 0) / options.gpus + 1e-9))
        if self.count < 1:
            self.close()
            asked = f"{options.cpus} CPU and {options.gpus:g} GPU"
            has = f"{total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU"
            raise ConfigError(f"search.workers: a trial asks for {asked}, the Ray cluster has {has}")
        self._run = self._ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RETRIES)(run_trial)
        self._busy: dict[Any, Task] = {}

    def _connect(self, address: str) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if address != "ray":
            try:
                self._ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise OliveError(f"search.workers: {address}: no Ray cluster answers there ({error})") from None
            return
        with suppress(ConnectionError):
            self._ray.init(address="auto", **quiet)
            return
        self._ray.init(include_dashboard=False, **quiet)

    def submit(self, task: Task) -> None:
        self._busy[self._run.remote(task)] = task

    def wait(self) -> list[Trial]:
        done, _ = self._ray.wait(list(self._busy), num_returns=1)
        found = []
        for reference in done:
            task = self._busy.pop(reference)
            try:
                found.append(self._ray.get(reference))
            except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError):
                found.append(died(task))
        return found

    def close(self) -> None:
        """Cancel what runs, and leave the cluster; one that was started for the search ends."""
        for reference in self._busy if hasattr(self, "_busy") else ():
            self._ray.cancel(reference, force=True)
        if self._joined:
            self._ray.shutdown()
