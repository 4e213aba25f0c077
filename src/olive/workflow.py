"""What a workflow says: the model, the target, the passes in order, what is measured and wanted of the result, how it
is checked, where it goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from olive.config import Config, Time, dump, parse
from olive.data.spec import DataSpec
from olive.errors import ConfigError, did_you_mean
from olive.evaluate.evaluators import EVALUATORS, Evaluator, evaluator_class, evaluator_name
from olive.goals import Goal, metric_names, parse_goal, read_goal
from olive.passes import pass_class, pass_name
from olive.passes.base import Pass
from olive.target import Target


class InputModel(Config):
    """The model to start from."""

    path: str = Field(min_length=1)
    """Hugging Face id, local folder (also one of our output folders), or azureml:// address."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    adapter_path: str | None = None
    """Folder of a PEFT adapter of this model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Verification(Config):
    """How the result is checked before it replaces what was there."""

    level: Literal["full", "files", "none"] = "full"
    """files: the bits in the files, digests, graph and configuration; full: also reload it, generate with it and
    compare it with its source; none: nothing."""
    max_kl: float | None = Field(None, gt=0)
    """Largest KL divergence from the source (nats per token) before the run fails; by default 0.5 at 4 bits and more,
    no limit below."""
    tokenizer: Literal["same", "any"] = "same"
    """same: the run fails if GenAI reads ordinary text, or the chat template's, otherwise than tokenizer.json says;
    any: that is only reported."""


class Search(Config):
    """How the best values of a workflow's holes are looked for."""

    sampler: Literal["tpe", "gp", "random", "grid", "nsga2", "qmc"] = "tpe"
    """What is tried next: tpe and gp learn from the trials before; nsga2 evolves a population, for several objectives;
    qmc spreads evenly; random; grid is every combination in order."""
    trials: int | None = Field(None, ge=1)
    """Trials at most; combinations that are not valid do not count. Default: 100; with grid, all."""
    time: Time | None = None
    """No trial is started after this time, as in 90s, 10m or 2h, resumed searches together."""
    order: Literal["joint", "pass_by_pass"] = "joint"
    """joint: all holes at once; pass_by_pass: one pass after the other, earlier ones as found best, later ones with the
    first of their values."""
    workers: int | str = 1
    """Trials that run at once: a number of local processes, ray (the cluster at hand, else this machine) or the
    ray://HOST:PORT of a cluster."""
    cpus: int = Field(1, ge=1)
    """Processor cores of one trial on Ray."""
    gpus: float = Field(0, ge=0)
    """GPUs of one trial on Ray; a fraction shares one."""
    stop_on_goals: bool = False
    """End once a trial meets every threshold."""
    proxy: float | None = Field(None, gt=0, lt=1)
    """Measure on this fraction of the evaluators' data first, and drop what is far behind there."""
    study: str | None = None
    """Folder that the trials are recorded in; an interrupted search goes on from it. Default: OUTPUT.study."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        known = value >= 1 if isinstance(value, int) else value == "ray" or value.startswith("ray://")
        if not known:
            raise ValueError("give a number of processes from 1, ray, or ray://HOST:PORT")
        return value


class Workflow(Config):
    """A validated run, ready to be planned."""

    input_model: InputModel
    """The model to start from."""
    target: Target = Target()
    """Where the finished model will run."""
    passes: tuple[SerializeAsAny[Pass], ...] = Field(min_length=1)
    """What is done to the model, in order. In a template, an option may be a hole, and a list of alternatives may stand
    in place of a pass."""
    evaluators: dict[str, SerializeAsAny[Evaluator]] = Field(default_factory=dict)
    """What is measured of the result, by names of your own."""
    goals: tuple[Goal, ...] = ()
    """What is wanted of the result: thresholds and directions of metrics, as text or as options."""
    search: Search | None = None
    """How the values of holes are looked for; only for a template."""
    verify: Verification = Verification()
    """How the result is checked."""
    compute_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where passes compute; auto: on a CUDA device if there is one."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    output_dir: str = Field(min_length=1)
    """Folder of the result."""


def read_workflow(data: Any, where: str = "workflow") -> Workflow:
    """Validate a workflow as read from a file: pass types and the names of data sets are resolved here."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    data = dict(data)
    named = read_data_sets(data.pop("data", None), where)
    steps = data.pop("passes", None)
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"{where}: passes: expected a list of passes, each with a type")
    found = [_read_pass(step, named, f"{where}: passes.{i}") for i, step in enumerate(steps)]
    unknown = [key for key in data if key not in Workflow.model_fields]
    if unknown:
        allowed = [*Workflow.model_fields, "data"]
        raise ConfigError(f"{where}: {unknown[0]}: unknown option{did_you_mean(str(unknown[0]), allowed)}")
    goals = data.pop("goals", None) or []
    if not isinstance(goals, (list, tuple)):
        raise ConfigError(f"{where}: goals: expected a list of goals, got {goals!r}")
    evaluators = _evaluators(data.pop("evaluators", None) or {}, named, goals, where)
    metrics = metric_names({name: own.metrics() for name, own in evaluators.items()})
    wanted = [read_goal(goal, metrics, f"{where}: goals.{i}", evaluators) for i, goal in enumerate(goals)]
    return parse(Workflow, data | {"passes": found, "evaluators": evaluators, "goals": wanted}, f"{where}: ")


def read_data_sets(sets: Any, where: str) -> dict[str, Any]:
    """Validate the named data sets of a workflow file."""
    sets = sets or {}
    if not isinstance(sets, Mapping):
        raise ConfigError(f"{where}: data: expected a mapping of names to data sets, got {sets!r}")
    named = {str(k): v for k, v in sets.items()}
    for name, spec in named.items():
        parse(DataSpec, spec, f"{where}: data.{name}.")
    return named


def _read_pass(step: Any, named: Mapping[str, Any], where: str) -> Pass:
    return parse(*pass_options(step, named, where), f"{where}.")


def pass_options(step: Any, named: Mapping[str, Any], where: str) -> tuple[type[Pass], dict[str, Any]]:
    """Return a pass's class, and its options with names of data sets resolved."""
    if isinstance(step, list):
        raise ConfigError(f"{where}: alternatives, which only olive run can search over; choose one of them")
    if not isinstance(step, Mapping) or not isinstance(step.get("type"), str):
        raise ConfigError(f"{where}: expected a mapping with a type, got {step!r}")
    return pass_class(step["type"], where), _options(step, named, where)


def _options(given: Mapping[str, Any], named: Mapping[str, Any], where: str) -> dict[str, Any]:
    options = {k: v for k, v in given.items() if k != "type"}
    data = options.get("data")
    if isinstance(data, str):
        if data not in named:
            raise ConfigError(f"{where}.data: no data set is called {data!r}{did_you_mean(data, named)}")
        options["data"] = named[data]
    return options


def _evaluators(given: Any, named: Mapping[str, Any], goals: Iterable[Any], where: str) -> dict[str, Evaluator]:
    """Read the evaluators; for a goal whose metric none of them has, add the evaluator that has it by default."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: evaluators: expected a mapping of names to evaluators, got {given!r}")
    found: dict[str, Evaluator] = {}
    for name, options in given.items():
        place = f"{where}: evaluators.{name}"
        if not isinstance(options, Mapping) or not isinstance(options.get("type"), str):
            raise ConfigError(f"{place}: expected a mapping with a type, got {options!r}")
        kind = evaluator_class(options["type"], place)
        found[str(name)] = parse(kind, _options(options, named, place), f"{place}.")
    for i, goal in enumerate(goals):
        metric = parse_goal(goal, f"{where}: goals.{i}")[0].metric
        if not any(metric in (*own.metrics(), *(f"{name}.{m}" for m in own.metrics())) for name, own in found.items()):
            found |= _by_default(metric, found)
    return found


def _by_default(metric: str, taken: Mapping[str, Evaluator]) -> dict[str, Evaluator]:
    for name in EVALUATORS:
        kind = evaluator_class(name)
        if name not in taken and not any(field.is_required() for field in kind.model_fields.values()):
            with suppress(ValidationError):
                own = kind()
                if metric in own.metrics():
                    return {name: own}
    return {}


def as_data(workflow: Workflow) -> dict[str, Any]:
    """Return the workflow as plain data that reads back as the same workflow."""
    data = workflow.model_dump(mode="json", exclude_none=True)
    data["passes"] = [
        {"type": pass_name(step), **step.model_dump(mode="json", exclude_none=True)} for step in workflow.passes
    ]
    data["evaluators"] = {
        name: {"type": evaluator_name(own), **own.model_dump(mode="json", exclude_none=True)}
        for name, own in workflow.evaluators.items()
    }
    data["goals"] = [goal.model_dump(mode="json", exclude_defaults=True) for goal in workflow.goals]
    return {name: value for name, value in data.items() if value or name not in ("evaluators", "goals")}


def without_places(data: dict[str, Any]) -> dict[str, Any]:
    """Reduce the folders of files and adapters to their names: where they lie is this machine's business."""
    data = data | {"input_model": dict(data["input_model"]), "passes": [dict(step) for step in data["passes"]]}
    if "evaluators" in data:
        data["evaluators"] = {name: dict(own) for name, own in data["evaluators"].items()}
    if "adapter_path" in data["input_model"]:
        data["input_model"]["adapter_path"] = Path(data["input_model"]["adapter_path"]).name
    for step in (*data["passes"], *data.get("evaluators", {}).values()):
        if "data" in step:
            step["data"] = step["data"] | {"files": [Path(file).name for file in step["data"].get("files", ())]}
    return data


def as_yaml(workflow: Workflow) -> str:
    """Return the workflow file that reproduces this run."""
    return dump(as_data(workflow))
