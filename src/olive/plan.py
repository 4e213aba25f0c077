"""Workflow -> Plan: every step with its key, known before anything runs.

A step's key is a digest of what it starts from, the pass and its options, the code and the library versions that
decide its result, and the data it reads. Steps with the same key have the same result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from olive import model as models
from olive.cache import Cache, check_replaceable
from olive.data.spec import FILE_READERS, DataSpec
from olive.errors import ConfigError, MissingDependency
from olive.estimate import Need, after, need, weights
from olive.evaluate.evaluators import Evaluator, evaluator_name
from olive.evaluate.function import Function
from olive.model import Model
from olive.passes import pass_name
from olive.passes.base import Pass
from olive.rates import Rates
from olive.remote import fetch
from olive.target import compute_device
from olive.workflow import Workflow


@dataclass(frozen=True)
class Step:
    """One pass to run, or to take from the cache."""

    name: str
    key: str
    work: Pass
    cached: bool
    reason: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What the key is the digest of."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the input comes from: ``step``, the pass before; or ``model``, with the digests of its ``files``."""
    need: Need | None = None
    """What running it takes; None if it is cached."""


@dataclass(frozen=True)
class Plan:
    """What a workflow will do."""

    workflow: Workflow
    source: Model
    source_key: str
    revision: str | None
    steps: tuple[Step, ...]
    compute_device: str
    output: Path

    def source_name(self) -> str:
        """Name of the input model without its place on this machine."""
        given = self.workflow.input_model.path
        return given if self.revision else Path(given).expanduser().resolve().name


def plan(workflow: Workflow, cache: Cache, *, overwrite: bool = False) -> Plan:
    """Resolve the model, check that the passes fit together and that the output may be written, and key the steps."""
    source, revision, inputs = open_source(workflow)
    _check_evaluators(_check_passes(source.kind, workflow), workflow)
    output = check_places(workflow, inputs, cache, overwrite=overwrite)
    device = compute_device(workflow.compute_device)
    source_key = _source_key(source, cache.digest)
    name = workflow.input_model.path if revision else inputs[0].resolve().name
    origin: dict[str, Any] = {"model": name, "files": models.digests(source.path, cache.digest)}
    steps, key, sizes, rates = [], source_key, weights(source), Rates(cache.root)
    for work in workflow.passes:
        parts = key_parts(work, key, workflow, device)
        key = step_digest(parts)
        where = None if work.missing() else cache.has(key)
        made = after(work, sizes, workflow.target.execution_provider())
        needed = None if where else need(work, sizes, made.size, device, rates)
        steps.append(Step(pass_name(work), key, work, where is not None, REASONS[where], parts, origin, needed))
        origin, sizes = {"step": pass_name(work)}, made
    return Plan(workflow, source, source_key, revision, tuple(steps), device, output)


def open_source(workflow: Workflow) -> tuple[Model, str | None, list[Path]]:
    """Return the input model, the revision that it was found at, and the folders that it came in."""
    given = workflow.input_model
    folder, revision = fetch(given.path, given.revision)
    adapter = Path(given.adapter_path).expanduser() if given.adapter_path else None
    source = models.open_model(folder, adapter, trust_remote_code=given.trust_remote_code)
    return source, revision, [folder, *([adapter] if adapter else [])]


LONGEST_NAME = 224
"""Bytes that the name of an output may have: what lies beside it, or is built there, has a longer one."""


def check_places(workflow: Workflow, inputs: list[Path], cache: Cache, *, overwrite: bool) -> Path:
    """Return the output's folder; refuse one that may not be written or replaced."""
    output = Path(workflow.output_dir).expanduser()
    output = output.resolve() if output.name == ".." or output.is_symlink() else output
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise ConfigError(f"{output}: the name is too long; give one of at most {LONGEST_NAME} bytes")
    readers: list[Pass | Evaluator] = [*workflow.passes, *workflow.evaluators.values()]
    kept = [Path.cwd(), Path.home(), cache.root, *(file for own in readers for file in _read(own))]
    _check_output(output, inputs, kept)
    writable(cache.root, f"{cache.root}: the cache cannot be written; set OLIVE_CACHE_DIR")
    check_replaceable(output, overwrite, cache.digest)
    for what in BESIDE:
        check_beside(beside(output, what), what, overwrite)
    return output


REASONS = {"here": "same key in the cache", "shared": "same key in the shared cache", None: "not in the cache"}


def _check_passes(kind: str, workflow: Workflow) -> str:
    """Refuse passes that cannot run one after the other; return the kind of the result."""
    provider = workflow.target.execution_provider()
    for i, step in enumerate(workflow.passes):
        lacking = [name for name in step.libraries if importlib.util.find_spec(module_of(name)) is None]
        if lacking:
            todo = f"run: pip install {' '.join(lacking)}"
            raise MissingDependency(f"passes.{i}: {pass_name(step)} needs {', '.join(lacking)}; {todo}")
        if step.targets and provider not in step.targets:
            built = ", ".join(step.targets)
            raise ConfigError(f"passes.{i}: {pass_name(step)} does not build for {provider} yet; it builds for {built}")
        if kind not in step.accepts:
            raise ConfigError(
                f"passes.{i}: {pass_name(step)} works on {' or '.join(step.accepts)} models, but gets {kind}"
            )
        kind = step.produces
    return kind


def _check_evaluators(kind: str, workflow: Workflow) -> None:
    """Refuse what could not be measured once all is done."""
    for name, own in workflow.evaluators.items():
        if kind not in own.kinds:
            raise ConfigError(
                f"evaluators.{name}: {evaluator_name(own)} measures {' and '.join(own.kinds)} models, and the passes "
                f"make one of kind {kind}; add the pass decoder"
            )
        missing = next((file for file in _read(own) if not file.exists()), None)
        if missing is not None:
            raise ConfigError(f"evaluators.{name}: {missing}: no such file")


def _check_output(output: Path, inputs: list[Path], kept: list[Path]) -> None:
    """Refuse an output that would replace the input or anything else that is not an output, or that cannot be."""
    place = output.resolve()
    for source in (path.resolve() for path in inputs):
        if place == source or place in source.parents or source in place.parents:
            raise ConfigError(
                f"{output}: the output must not hold, or lie in, the input {source}; choose another folder"
            )
    for path in (path.resolve() for path in kept):
        if place == path or place in path.parents:
            raise ConfigError(f"{output}: holds {path}, which would be lost; choose another folder for the output")
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{output}: is a file; give a folder for the output")
    if place.is_mount():
        raise ConfigError(f"{output}: is a mount point, which cannot be replaced whole; give a folder below it")
    writable(place.parent, f"{output}: cannot be written")


def writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made or written, found out by doing it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".olive-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{what} ({existing}: {error.strerror}); choose another place") from None


BESIDE = {
    "report.json": b'{\n "workflow"',
    "report.html": b"<!DOCTYPE html>\n<!-- Olive report -->",
    "lock.json": b'{\n "format": "olive-lock"',
}
"""Files that are written beside an output, and how those of ours begin."""


def check_beside(path: Path, what: str, overwrite: bool) -> None:
    """Report and lock go beside the output: refuse to replace a file there that is neither."""
    if path.exists() and not overwrite and not (path.is_file() and path.read_bytes().startswith(BESIDE[what])):
        raise ConfigError(
            f"{path}: is in the way of the {what.split('.')[0]} and not one of ours; move it or give --overwrite"
        )


def beside(output: Path, what: str) -> Path:
    """Return where a file that accompanies an output goes, as ``OUTPUT.report.json``."""
    return output.with_name(f"{output.name}.{what}")


def _source_key(source: Model, digest: Callable[[Path], str]) -> str:
    parts: dict[str, Any] = {"kind": source.kind, "model": models.fingerprint(source.path, digest)}
    parts |= {
        f"adapter {name}": [models.fingerprint(path, digest), (models.read_manifest(path) or {}).get("base_digest")]
        for name, path in source.adapters.items()
        if path.is_dir()
    }
    return step_digest(parts)


def key_parts(step: Pass, input_key: str, workflow: Workflow, device: str) -> dict[str, Any]:
    """Return everything that decides a step's result."""
    return {
        "input": input_key,
        "pass": pass_name(step),
        "options": step.model_dump(mode="json", exclude={name: {"files"} for name in _data(step)}),
        "seed": workflow.seed,
        "device": device,
        "target": workflow.target.execution_provider() if step.targets else None,
        "trust_remote_code": workflow.input_model.trust_remote_code,
        "data": _data_digests(step),
        "folders": [models.fingerprint(folder) for folder in step.folders()],
        "code": {name: code_digest(name) for name in step.sources},
        "versions": {name: version(name) for name in step.libraries},
    }


def _data(own: Pass | Evaluator) -> dict[str, DataSpec]:
    values = {name: getattr(own, name) for name in type(own).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, DataSpec)}


def _read(own: Pass | Evaluator) -> list[Path]:
    """Return the files and folders of the user's that a pass or an evaluator reads."""
    data = _data(own).values()
    found = [Path(file) for spec in data for file in spec.files]
    found += [Path(spec.name) for spec in data if spec.name not in FILE_READERS and Path(spec.name).is_dir()]
    found += [Path(own.file)] if isinstance(own, Function) else []
    return found + (list(own.folders()) if isinstance(own, Pass) else [])


def _data_digests(step: Pass) -> dict[str, str]:
    from olive.data.rows import fingerprint

    return {name: fingerprint(spec) for name, spec in _data(step).items()}


def version(distribution: str) -> str:
    """Return the version of an installed distribution, or of another that brings the same module (onnxruntime-gpu)."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        others = metadata.packages_distributions().get(module_of(distribution), [])
        return f"{others[0]} {metadata.version(others[0])}" if others else "none"


def module_of(distribution: str) -> str:
    """Return the module that a distribution brings."""
    return distribution.replace("-", "_")


def code_digest(module: str) -> str:
    """Digest the source of a module, or all modules and texts of a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module}: listed as the source of a pass, but there is no such module")
    origin = Path(spec.origin)
    paths = (
        sorted(p for p in origin.parent.rglob("*") if p.suffix in (".py", ".txt"))
        if spec.submodule_search_locations
        else [origin]
    )
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def step_digest(parts: Any) -> str:
    """Digest plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
