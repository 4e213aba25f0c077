"""What a workflow says: the model, the target, the passes in order, how the result is checked, where it goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from olive.config import Config, dump, parse
from olive.data.spec import DataSpec
from olive.errors import ConfigError, did_you_mean
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


class Workflow(Config):
    """A validated run, ready to be planned."""

    input_model: InputModel
    """The model to start from."""
    target: Target = Target()
    """Where the finished model will run."""
    passes: tuple[SerializeAsAny[Pass], ...] = Field(min_length=1)
    """What is done to the model, in order."""
    verify: Verification = Verification()
    """How the result is checked."""
    compute_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where passes compute; auto: on a CUDA device if there is one."""
    seed: int = 0
    """Seed of everything random."""
    output_dir: str = Field(min_length=1)
    """Folder of the result."""


def read_workflow(data: Any, where: str = "workflow") -> Workflow:
    """Validate a workflow as read from a file: pass types and the names of data sets are resolved here."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    data = dict(data)
    sets = data.pop("data", None) or {}
    if not isinstance(sets, Mapping):
        raise ConfigError(f"{where}: data: expected a mapping of names to data sets, got {sets!r}")
    named = {str(k): v for k, v in sets.items()}
    for name, spec in named.items():
        parse(DataSpec, spec, f"{where}: data.{name}.")
    steps = data.pop("passes", None)
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"{where}: passes: expected a list of passes, each with a type")
    found = [_read_pass(step, named, f"{where}: passes.{i}") for i, step in enumerate(steps)]
    unknown = [key for key in data if key not in Workflow.model_fields]
    if unknown:
        allowed = [*Workflow.model_fields, "data"]
        raise ConfigError(f"{where}: {unknown[0]}: unknown option{did_you_mean(str(unknown[0]), allowed)}")
    return parse(Workflow, data | {"passes": found}, f"{where}: ")


def _read_pass(step: Any, named: Mapping[str, Any], where: str) -> Pass:
    if not isinstance(step, Mapping) or not isinstance(step.get("type"), str):
        raise ConfigError(f"{where}: expected a mapping with a type, got {step!r}")
    kind = pass_class(step["type"], where)
    options = {k: v for k, v in step.items() if k != "type"}
    for name, value in options.items():
        if name == "data" and isinstance(value, str):
            if value not in named:
                raise ConfigError(f"{where}.data: no data set is called {value!r}{did_you_mean(value, named)}")
            options[name] = named[value]
    return parse(kind, options, f"{where}.")


def as_data(workflow: Workflow) -> dict[str, Any]:
    """Return the workflow as plain data that reads back as the same workflow."""
    data = workflow.model_dump(mode="json", exclude_none=True)
    data["passes"] = [
        {"type": pass_name(step), **step.model_dump(mode="json", exclude_none=True)} for step in workflow.passes
    ]
    return data


def without_places(data: dict[str, Any]) -> dict[str, Any]:
    """Reduce the folders of files and adapters to their names: where they lie is this machine's business."""
    data = data | {"input_model": dict(data["input_model"]), "passes": [dict(step) for step in data["passes"]]}
    if "adapter_path" in data["input_model"]:
        data["input_model"]["adapter_path"] = Path(data["input_model"]["adapter_path"]).name
    for step in data["passes"]:
        if "data" in step:
            step["data"] = step["data"] | {"files": [Path(file).name for file in step["data"].get("files", ())]}
    return data


def as_yaml(workflow: Workflow) -> str:
    """Return the workflow file that reproduces this run."""
    return dump(as_data(workflow))
