"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from olive.errors import ConfigError, OliveError, did_you_mean, require
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.evaluate.metrics import Metric
from olive.model import Model

if TYPE_CHECKING:
    from lm_eval.api.model import LM

LONGEST = 2048
FEWSHOT_SEED = 1234
"""The harness's own, so that the examples are those that published figures have."""


class Score(NamedTuple):
    """A number that the harness will give, and where among its results."""

    owner: str
    key: str
    metric: Metric


class LmEval(Evaluator):
    """Run tasks of lm-eval. ONNX models are scored in an ONNX Runtime session over all positions, several rows at a
    time, and generate in GenAI; checkpoints run in the harness's own transformers backend.

    The metrics are called TASK.METRIC, with the direction that the harness gives them; a group of tasks that has an
    average gives that average.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups, or YAML files of tasks."""
    include_path: str | None = None
    """Folder with YAML files of further tasks."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in front of each question; by default what the task says."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many rows of each task."""
    batch_size: int = Field(16, ge=1)
    """Rows that are read at once."""
    max_length: int | None = Field(None, ge=2)
    """Longest text that is read at once, in tokens; by default what the model allows, at most 2048."""
    apply_chat_template: bool = False
    """Put questions as the user's messages of a chat."""

    def metrics(self) -> dict[str, Metric]:
        return {score.metric.name: score.metric for score in self._scores()}

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        harness = require("lm_eval.evaluator", "eval")
        loaded = self._load()
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            results = harness.evaluate(
                lm=self._lm(model, ctx),
                task_dict=loaded,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.apply_chat_template,
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise OliveError(f"lm-eval stopped on {', '.join(self.tasks)}: {error}") from error
        ctx.note(rows={name: count["effective"] for name, count in results["n-samples"].items()})
        found = {}
        for owner, key, metric in self._scores():
            value = results["results"].get(owner, {}).get(key)
            if not isinstance(value, (int, float)):
                raise OliveError(f"lm-eval gave {value!r} for {key} of {owner}, which is no number")
            found[metric.name] = float(value)
        return found

    def _lm(self, model: Model, ctx: Measuring) -> LM:
        from olive.evaluate.text import context_length

        length = self.max_length or min(LONGEST, context_length(model))
        if model.kind == "onnx":
            from olive.evaluate.bridge import OnnxLM

            return OnnxLM(model, ctx.adapter, batch_size=self.batch_size, max_length=length)
        from lm_eval.models.huggingface import HFLM

        from olive.runtime.torch_model import load, load_adapted, load_tokenizer

        trust, device = model.trust_remote_code, ctx.compute_device
        if ctx.adapter is None:
            loaded = load(model.path, device=device, trust_remote_code=trust)
        else:
            loaded = load_adapted(model.path, ctx.adapter, device=device, trust_remote_code=trust).get_base_model()
        tokenizer = load_tokenizer(model.path, trust)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that was loaded before
        return HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=self.batch_size, max_length=length)

    def _load(self) -> Any:
        loaded = _tasks(self.tasks, self.include_path, self.num_fewshot)
        if not loaded["tasks"]:
            raise ConfigError(f"lm_eval: tasks: {', '.join(self.tasks)}: there is no task in it")
        return loaded

    def _scores(self) -> Iterator[Score]:
        """Yield what will be measured: averages of groups that have one, else each task."""
        loaded = self._load()
        covered: set[str] = set()
        for group in loaded["groups"].values():
            if group.has_aggregation and group.name not in covered:
                covered |= {task.task_name for task in group.get_all_tasks()} | {g.name for g in group.get_all_groups()}
                yield from _group_scores(group)
        for name, task in loaded["tasks"].items():
            if name not in covered:
                for metric, higher in task.higher_is_better().items():
                    for kind in _filters(task):
                        yield _score(name, metric, kind, higher)


def _group_scores(group: Any) -> Iterator[Score]:
    tasks = group.get_all_tasks()
    for wanted in group.aggregate_metric_list:
        higher = {task.higher_is_better().get(wanted.metric) for task in tasks} - {None}
        if len(higher) != 1:
            raise ConfigError(
                f"lm_eval: tasks: {group.name}: its tasks do not agree whether more {wanted.metric} is better"
            )
        for kind in wanted.filter_list or sorted({kind for task in tasks for kind in _filters(task)}):
            yield _score(group.name, wanted.metric, kind, higher.copy().pop())


def _score(owner: str, metric: str, kind: str, higher: bool | None) -> Score:
    name = f"{owner}.{metric}" + ("" if kind == "none" else f".{kind}")
    if higher is None:
        raise ConfigError(
            f"lm_eval: tasks: {name}: the harness does not say whether more is better; set higher_is_better"
        )
    help = f"{metric} of lm-eval's {owner}" + ("" if kind == "none" else f", answers filtered by {kind}")
    return Score(owner, f"{metric},{kind}", Metric(name, "maximize" if higher else "minimize", "", help))


def _filters(task: Any) -> list[str]:
    return [kind["name"] for kind in task.get_config("filter_list") or ()] or ["none"]


@functools.lru_cache(maxsize=8)
def _tasks(names: tuple[str, ...], include_path: str | None, num_fewshot: int | None) -> Any:
    """Load tasks with their data. The harness's own thousands are looked through only for a name that is elsewhere not
    found: that takes many seconds."""
    require("lm_eval", "eval")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"lm_eval: include_path {include_path}: no such folder")
    for name in names:
        if Path(name).suffix in (".yaml", ".yml") and not Path(name).is_file():
            raise ConfigError(f"lm_eval: tasks: {name}: no such file")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = did_you_mean(name, manager.all_tasks) if len(manager.all_tasks) else ""
            near = near if "did you mean" in near else "; lm-eval ls tasks lists them"
            raise ConfigError(f"lm_eval: tasks: no task is called {name!r}{near}")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever the task's own code or the datasets library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"lm_eval: tasks: {', '.join(names)}: cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # as in the harness: a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded
