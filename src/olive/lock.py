"""The lock of an output: all that its run depended on, so that it can be done again and compared byte by byte.

It lies beside the output and not in it: it names the machine, and an output does not depend on where it was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from olive import __version__
from olive import model as models
from olive.config import load
from olive.data.rows import FILE_READERS, fingerprint
from olive.data.spec import DataSpec
from olive.errors import ConfigError, did_you_mean
from olive.machine import machine
from olive.passes.base import Pass
from olive.plan import Plan, code_digest, version
from olive.workflow import as_data

FORMAT = "olive-lock"
FORMAT_VERSION = 1
BESIDE_THE_BYTES = ("evaluators", "goals", "search", "verify")
"""Parts of a workflow that do not decide what the output's files hold."""
Digest = Callable[[Path], str]


def lock(plan: Plan, cached: list[bool], files: Mapping[str, str], digest: Digest = models.sha256) -> dict[str, Any]:
    """Describe a finished run; ``cached`` tells of each step whether it came from the cache, ``files`` are the digests
    of the output."""
    steps = tuple(step.work.alone() for step in plan.steps)
    workflow = as_data(plan.workflow.model_copy(update={"passes": steps, "compute_device": plan.compute_device}))
    workflow = {name: value for name, value in workflow.items() if name not in BESIDE_THE_BYTES}
    if plan.revision:
        workflow["input_model"] = workflow["input_model"] | {"revision": plan.revision}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "workflow": workflow,
        "source": {
            "model": plan.source_name(),
            "revision": plan.revision,
            "digest": plan.source_key,
            "files": models.digests(plan.source.path, digest),
        },
        "data": _data(steps, digest),
        "steps": [
            {"pass": step.name, "key": step.key, "cached": known}
            for step, known in zip(plan.steps, cached, strict=True)
        ],
        "olive": {"version": __version__, "code": code_digest("olive")},
        "versions": versions(steps),
        "machine": machine(plan.compute_device),
        "files": dict(files),
    }


def versions(steps: tuple[Pass, ...]) -> dict[str, str]:
    """Return the versions of the libraries that Olive requires and of those that the passes name."""
    try:
        required = metadata.requires("olive-onnx") or []
    except metadata.PackageNotFoundError:  # run from the sources
        required = []
    names = {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required if "extra ==" not in text}
    return {name: version(name) for name in sorted(names | {library for step in steps for library in step.libraries})}


def _inputs(steps: tuple[Pass, ...], digest: Digest) -> dict[str, str]:
    """Return the digest of everything but the model that the steps read, by its path or the dataset's hub id."""
    found: dict[str, str] = {}
    for step in steps:
        for spec in _data_sets(step):
            if spec.name in FILE_READERS:
                found |= {str(Path(file)): digest(Path(file)) for file in spec.files}
            elif Path(spec.name).is_dir():
                found[str(Path(spec.name))] = models.fingerprint(Path(spec.name), digest)
            else:
                found[spec.name] = fingerprint(spec)
        found |= {str(folder): models.fingerprint(folder, digest) for folder in step.folders()}
    return found


def _data_sets(value: Any) -> Iterator[DataSpec]:
    """Yield every data set in an option's value, however deep."""
    if isinstance(value, DataSpec):
        yield value
    elif isinstance(value, BaseModel):
        yield from (spec for name in type(value).model_fields for spec in _data_sets(getattr(value, name)))
    elif isinstance(value, Mapping):
        yield from (spec for item in value.values() for spec in _data_sets(item))
    elif isinstance(value, (tuple, list)):
        yield from (spec for item in value for spec in _data_sets(item))


def _data(steps: tuple[Pass, ...], digest: Digest) -> dict[str, dict[str, str]]:
    """Name what the steps read: by the name of the file or folder, with a number behind where two have the same."""
    found: dict[str, dict[str, str]] = {}
    for place, known in _inputs(steps, digest).items():
        local = Path(place).exists()
        name = first = Path(place).name if local else place
        count = 1
        while name in found:
            count += 1
            name = f"{first}-{count}"
        found[name] = {"path" if local else "dataset": place, "digest": known}
    return found


def write_lock(locked: Mapping[str, Any], path: Path) -> None:
    """Write a lock file."""
    path.write_text(json.dumps(locked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class _Workflow(BaseModel):
    input_model: dict[str, Any]
    passes: list[Any]
    output_dir: str


class _Source(BaseModel):
    digest: str
    files: dict[str, str]


class _Local(BaseModel):
    path: str
    digest: str


class _Dataset(BaseModel):
    dataset: str
    digest: str


class _Step(BaseModel):
    name: str = Field(alias="pass")
    cached: bool


class _Lock(BaseModel):
    """What is read of a lock file; somebody may have sent it, or edited it."""

    workflow: _Workflow
    source: _Source
    data: dict[str, _Local | _Dataset]
    steps: list[_Step]
    olive: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    files: dict[str, str]


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock file; refuse what is none."""
    data = load(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a lock file; Olive writes one beside each output, as OUTPUT.lock.json")
    if data.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: a lock file of version {data.get('format_version')}; this Olive reads version {FORMAT_VERSION}"
        )
    try:
        _Lock.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place, message = ".".join(str(part) for part in first["loc"] if part != "_Local"), first["msg"]
        raise ConfigError(f"{path}: {place}: {message[0].lower() + message[1:]}; the lock was changed or cut") from None
    return data


def places(locked: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, str]:
    """Return where each named file or folder of data lies now; ``moved`` gives those that are elsewhere."""
    local = {name: entry["path"] for name, entry in locked["data"].items() if "path" in entry}
    for name in moved:
        if name not in local:
            raise ConfigError(f"--data {name}: the lock has no data of this name{did_you_mean(name, local)}")
    found = {name: str(Path(moved.get(name, path))) for name, path in local.items()}
    for name, place in found.items():
        if not Path(place).exists():
            raise ConfigError(f"data {name}: not at {place}; say where it lies with --data {name}=PATH")
    return found


def workflow_of(locked: Mapping[str, Any], where: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Return the workflow of a lock as plain data, with its inputs at their present places."""
    moves = {Path(locked["data"][name]["path"]): place for name, place in where.items()}

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(item) for name, item in value.items()}
        if isinstance(value, list):
            return [move(item) for item in value]
        return moves.get(Path(value), value) if isinstance(value, str) else value

    workflow = locked["workflow"]
    return workflow | {"passes": move(workflow["passes"]), "verify": {"level": "none"}, "output_dir": str(output)}


def check_inputs(locked: Mapping[str, Any], where: Mapping[str, str], plan: Plan, digest: Digest) -> None:
    """Refuse inputs that are not those of the lock, each by its name."""
    differing = []
    if plan.source_key != locked["source"]["digest"]:
        names = changed_files(locked["source"]["files"], models.digests(plan.source.path, digest))
        differing.append(f"model {plan.source.path}: {', '.join(names) or 'its adapter, in name or contents'}")
    present = _inputs(tuple(step.work for step in plan.steps), digest)
    for name, entry in locked["data"].items():
        place = where[name] if name in where else entry["dataset"]
        if present.get(place) != entry["digest"]:
            differing.append(f"data {name}: {place}")
    if differing:
        raise ConfigError("not the inputs that the lock names; these differ from them:\n" + "\n".join(differing))


def changed_files(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Name the files that are on one side only or have another digest."""
    return sorted({name for name, _ in set(before.items()) ^ set(after.items())})


def changed_facts(locked: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is not as the lock has it, of Olive, the libraries and the machine: name, value there, value here."""
    here = {
        "olive": {"version": __version__, "code": code_digest("olive")},
        "versions": versions(tuple(step.work for step in plan.steps)),
        "machine": machine(plan.compute_device),
    }
    for part, now in here.items():
        then = locked[part]
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                yield f"olive {name}" if part == "olive" else name, then.get(name), now.get(name)
