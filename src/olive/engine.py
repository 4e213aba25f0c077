"""Run a plan: take each step from the cache or run it into a fresh folder, verify the result, lay it out whole."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from olive import __version__, verify
from olive.cache import Cache, Entry, check_replaceable, lay, output_lock, swap, sweep
from olive.errors import PassError
from olive.estimate import observe, weights
from olive.evaluate.evaluators import Evaluator
from olive.goals import Judge, metric_names, source_metrics
from olive.lock import lock
from olive.measure import Subject, measure
from olive.model import FORMAT_VERSION, Model, digests, files, write_manifest
from olive.passes.base import Context
from olive.plan import Plan, Step, code_digest, step_digest, version
from olive.rates import Rates
from olive.report import Report, StepRecord, all_fallbacks
from olive.resources import Watch
from olive.workflow import as_data, without_places

VERIFIED_BY = ("olive.verify", "olive.evaluate", "olive.runtime", "olive.data", "olive.quant", "olive.decoder")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Made:
    """The steps of a plan, done; the result lies in the cache."""

    model: Model
    before: Model
    """The input of the last step."""
    entry: Entry
    report: Report

    def key(self) -> str:
        """Return the key of the result."""
        return self.entry.key


def make(plan: Plan, cache: Cache, progress: Progress = lambda *_: None) -> Made:
    """Run the plan's steps, or take them from the cache; nothing is laid out."""
    report = Report(
        as_data(plan.workflow),
        str(plan.output),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        source_bytes=_size(plan.source.path),
    )
    model, before = plan.source, plan.source
    entry: Entry | None = None
    input_key = plan.source_key
    for step in plan.steps:
        started = time.perf_counter()
        with cache.lock(step.key):
            entry = None if step.work.missing() else cache.get(step.key)
            cached = entry is not None
            if entry is None:
                entry = _run_step(step, model, input_key, plan, cache, progress)
        before, input_key, model = model, step.key, _open(entry, plan.source.trust_remote_code)
        seconds = time.perf_counter() - started
        facts = entry.record["facts"]
        report.steps.append(StepRecord(step.name, step.key, cached, seconds, facts, _reason(step, cached)))
    assert entry is not None  # a workflow has at least one pass
    return Made(model, before, entry, report)


def run(plan: Plan, cache: Cache, *, overwrite: bool = False, progress: Progress = lambda *_: None) -> Report:
    """Run the plan's steps, verify and measure; the output folder appears, or is replaced, only when everything has
    succeeded."""
    began = time.perf_counter()
    made = make(plan, cache, progress)
    report = made.report
    report.verification = _verify(plan, made.entry, made.model, made.before, cache, progress)
    _measure(plan, made, cache, progress)
    manifest = _manifest(plan, made.entry, report)
    with _disk_space(plan.output):
        _commit(made.entry, manifest, plan.output, overwrite, cache)
    report.output_bytes = _size(plan.output / made.entry.record["model"])
    report.sizes = {name: (plan.output / name).stat().st_size for name in made.entry.record["files"]}
    report.lock = lock(plan, [step.cached for step in report.steps], made.entry.record["files"], cache.digest)
    report.seconds = time.perf_counter() - began
    return report


def _reason(step: Step, cached: bool) -> str:
    """Say why a step ran or did not; the plan's reason is outdated if another run made the entry since, or lost it."""
    if cached == step.cached:
        return step.reason
    return "made by another run meanwhile" if cached else "its cache entry is gone"


def measured_source(plan: Plan, cache: Cache) -> dict[str, float]:
    """Measure of the input model what goals are relative to."""
    workflow = plan.workflow
    wanted = source_metrics(workflow.goals)
    needed = {name: own for name, own in workflow.evaluators.items() if wanted & _names(name, own)}
    if not needed:
        return {}
    return measure(needed, Subject(plan.source, plan.source_key, plan), cache)


def _names(name: str, evaluator: Evaluator) -> set[str]:
    return {text for metric in evaluator.metrics() for text in (metric, f"{name}.{metric}")}


def _measure(plan: Plan, made: Made, cache: Cache, progress: Progress) -> None:
    """Write the result's figures, and which goals they meet, into the report."""
    workflow, report = plan.workflow, made.report
    if not workflow.evaluators:
        return
    progress("measure", 0, 1)
    report.metrics = measure(workflow.evaluators, Subject(made.model, made.key(), plan), cache)
    report.metrics_source = measured_source(plan, cache)
    metrics = metric_names({name: own.metrics() for name, own in workflow.evaluators.items()})
    report.goals = Judge(workflow.goals, metrics, report.metrics_source).judge(report.metrics).rows
    progress("measure", 1, 1)


def _run_step(step: Step, model: Model, input_key: str, plan: Plan, cache: Cache, progress: Progress) -> Entry:
    facts: dict[str, Any] = {}
    with cache.stage(step.key) as staged, cache.scratch(step.key) as scratch, _disk_space(staged):
        out = staged / "files"
        context = Context(
            out=out,
            input_key=input_key,
            scratch=scratch,
            target=plan.workflow.target,
            compute_device=plan.compute_device,
            seed=plan.workflow.seed,
            digest=cache.digest,
            note=facts.update,
            progress=progress,
        )
        began = time.perf_counter()
        with Watch() as watch:
            result = step.work.run(model, context)
        seconds = time.perf_counter() - began
        record = {
            "pass": step.name,
            "parts": dict(step.parts),
            "origin": dict(step.origin),
            "seconds": round(seconds, 3),
            "kind": result.kind,
            "model": result.path.relative_to(out).as_posix(),
            "adapters": {name: path.relative_to(out).as_posix() for name, path in result.adapters.items()},
            "facts": facts,
            "files": digests(out, cache.digest),
        }
        Rates(cache.root).add(observe(step.work, weights(model), plan.compute_device, seconds, watch.peak))
        return cache.get(step.key) or cache.put(step.key, staged, record)


def _open(entry: Entry, trust_remote_code: bool) -> Model:
    record = entry.record
    adapters = {name: entry.files / path for name, path in record["adapters"].items()}
    title = f"the result of {record['pass']}"
    return Model(record["kind"], entry.files / record["model"], adapters, trust_remote_code, title)


def _verify(plan: Plan, entry: Entry, model: Model, before: Model, cache: Cache, progress: Progress) -> dict[str, Any]:
    """Check the result as far as the workflow asks; what passed once is remembered under its own key."""
    asked = plan.workflow.verify
    if asked.level == "none":
        return {}
    parts = {
        "verify": asked.model_dump(),
        "model": entry.key,
        "source": plan.source_key,
        "code": {name: code_digest(name) for name in VERIFIED_BY},
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "onnxruntime-genai")},
    }
    key = step_digest(parts)
    known = cache.get(key)
    if known is not None:
        return known.record["facts"]
    progress("verify", 0, 1)
    bits = entry.record["facts"].get("bits", {})
    compared = asked.level == "full" and any(step.work.changes_model for step in plan.steps)
    figures: dict[str, Any] = {"level": "full" if compared else "files", **verify.check_files(model, bits)}
    if compared and model.kind == "onnx":
        strict = asked.tokenizer == "same"
        figures["tokenizer"] = verify.check_tokenizer(model, plan.source, strict=strict)
    if compared:
        figures |= verify.check_quality(
            model,
            plan.source,
            reference=before if before.adapters else None,
            bits=bits,
            max_kl=asked.max_kl,
            device=plan.compute_device,
            provider=plan.workflow.target.execution_provider(),
        )
    progress("verify", 1, 1)
    with cache.lock(key), cache.stage(key) as staged:
        if cache.get(key) is None:
            cache.put(key, staged, {"pass": "verify", "parts": parts, "facts": figures, "files": {}})
    return figures


def _manifest(plan: Plan, entry: Entry, report: Report) -> dict[str, Any]:
    """Describe the output: nothing in here depends on when or where the run took place."""
    record, facts = entry.record, entry.record["facts"]
    libraries = sorted({name for step in plan.steps for name in step.work.libraries})
    workflow = without_places(as_data(plan.workflow)) | {"output_dir": plan.output.name}
    workflow["input_model"] |= {"path": plan.source_name()}
    return {
        "format": "olive",
        "format_version": FORMAT_VERSION,
        "kind": record["kind"],
        "model": record["model"],
        "adapters": {
            name: {"path": path, **facts.get("adapters", {}).get(name, {})} for name, path in record["adapters"].items()
        },
        "source": {"model": plan.source_name(), "revision": plan.revision, "digest": plan.source_key},
        "made_by": {
            "olive": __version__,
            "workflow": workflow,
            "steps": [{"pass": step.name, "key": step.key} for step in plan.steps],
            "libraries": {name: version(name) for name in libraries},
        },
        "bits": facts.get("bits", {}),
        "fallbacks": all_fallbacks(facts),
        "verification": report.verification,
        "files": record["files"],
    }


def _commit(entry: Entry, manifest: Mapping[str, Any], output: Path, overwrite: bool, cache: Cache) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output_lock(output):  # two processes may write the same output: one after the other
        sweep(output.parent, f".{output.name}.building.*")
        staged = output.parent / f".{output.name}.building.{os.getpid()}"
        staged.mkdir()
        try:
            lay(entry.files, staged, move=not cache.kept)
            write_manifest(staged, manifest)
            check_replaceable(output, overwrite, cache.digest)
            swap(staged, output)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _disk_space(where: Path) -> Iterator[None]:
    """Turn a full disk into an error that says so, whoever noticed it."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left on device" in str(error):  # safetensors words the system's error itself
            place = next((p for p in (where, *where.parents) if p.exists()), where)
            free = shutil.disk_usage(place).free / 1e6
            message = f"{where}: no space left while writing ({free:.0f} MB free); free some, or set OLIVE_CACHE_DIR"
            raise PassError(message) from None
        raise


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in files(folder))
