"""Workflow files of Microsoft Olive, read as ours.

What has a counterpart is translated; each key that has none is named with its place, and a pass without one is refused
unless it may be left out. ``docs/compat.md`` has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olive.compat.data import data_sets
from olive.compat.notes import Notes, flat
from olive.compat.passes import convert_passes
from olive.errors import ConfigError, did_you_mean
from olive.target import PROVIDERS

SIGNS = ("systems", "data_configs", "engine", "pass_flows", "builds", "auto_optimizer_config")
"""Parts that only their files have."""
NEEDLESS = ("cache_dir", "clean_cache", "clean_evaluation_cache", "log_severity_level", "log_to_file", "no_artifacts",
            "host", "evaluate_input_model", "plot_pareto_frontier", "ort_log_severity_level", "workflow_id",
            "ort_py_log_severity_level", "output_name", "python_environment_path")  # fmt: skip
"""Settings of their engine that change nothing in the result, or that flags of ours give."""
ENGINE = ("output_dir", "target", "evaluator", "search_strategy", "execution_providers", "packaging_config")
SAMPLERS = {"tpe": "tpe", "random": "random", "exhaustive": "grid", "sequential": "grid"}


@dataclass(frozen=True)
class Converted:
    """One of their files as ours."""

    data: dict[str, Any]
    notes: tuple[str, ...]
    """What was left out or is done otherwise, each with its place."""


def is_foreign(data: Any) -> bool:
    """Tell one of their files from one of ours: passes by name, a typed input model, or parts that ours has not."""
    if not isinstance(data, Mapping):
        return False
    model = data.get("input_model")
    typed = isinstance(model, Mapping) and ("type" in model or "model_path" in model)
    steps = data.get("passes")
    return typed or (isinstance(steps, Mapping) and "type" not in steps) or any(sign in data for sign in SIGNS)


def convert(data: Mapping[str, Any], where: str, *, skip_unknown: bool = False) -> Converted:
    """Translate one of their files. ``skip_unknown``: leave out passes that have no counterpart."""
    notes = Notes()
    for part in ("builds", "auto_optimizer_config"):
        if data.get(part):
            raise ConfigError(f"{where}: {part}: has no counterpart; write one workflow file for each build")
    engine = _engine(data, notes)
    named = data_sets(data.get("data_configs"), notes)
    steps = convert_passes(data, named, notes)
    found: dict[str, Any] = {
        "input_model": _input_model(data.get("input_model"), where, notes),
        "target": _target(data, engine, where, notes),
    }
    used = {step["data"] for step in _flat_steps(steps) if isinstance(step.get("data"), str)}
    if used:
        found["data"] = {name: named[name] for name in named if name in used}
    found["passes"] = steps
    found |= _evaluators(data, engine, notes) | _search(engine, steps, notes)
    if engine.get("output_dir"):
        found["output_dir"] = engine["output_dir"]
    if notes.refused and not skip_unknown:
        said = "\n".join(f"{where}: {line}" for line in notes.refused)
        raise ConfigError(f"{said}\nPasses without a counterpart are left out with --skip_unknown.")
    if not steps:
        raise ConfigError(f"{where}: passes: none of them has a counterpart")
    return Converted(found, (*notes.refused, *notes.lines))


def _flat_steps(steps: list[Any]) -> list[dict[str, Any]]:
    return [step for group in steps for step in (group if isinstance(group, list) else [group])]


def _engine(data: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """Return the engine's settings, which stand in a part of their own or among the others."""
    known = ("input_model", "systems", "data_configs", "evaluators", "passes", "engine", "pass_flows", "data_root",
             "builds", "auto_optimizer_config", "azureml_client")  # fmt: skip
    own = flat(data.get("engine"))
    found = {f"engine.{name}" if name in own else name: value for name, value in
             ({name: value for name, value in data.items() if name not in known} | own).items()}  # fmt: skip
    settings = {}
    for place, value in found.items():
        name = place.rpartition(".")[2]
        if name in ENGINE:
            settings[name] = value
        elif name not in NEEDLESS:
            notes.add(place, "has no counterpart; left out")
    if settings.get("packaging_config"):
        notes.add("packaging_config", "has no counterpart; the output folder is the package")
    if data.get("azureml_client"):
        notes.add("azureml_client", "has no counterpart; the workflow runs here")
    return settings


def _input_model(given: Any, where: str, notes: Notes) -> dict[str, Any]:
    model = flat(given)
    kind = str(model.pop("type", "HfModel"))
    hf = flat(model.pop("hf_config", None))
    path = model.pop("model_path", None) or hf.pop("model_name", None)
    if path is None or kind.lower() not in ("hfmodel", "pytorchmodel", "onnxmodel", "ptmodel"):
        raise ConfigError(
            f"{where}: input_model: a model of type {kind} {'without model_path ' if path is None else ''}has no "
            "counterpart; give a Hugging Face id or folder as model_path"
        )
    found: dict[str, Any] = {"path": str(path)}
    loading = flat(model.pop("load_kwargs", None)) | flat(hf.pop("from_pretrained_args", None))
    for name, value in {"adapter_path": model.pop("adapter_path", None), "revision": loading.pop("revision", None),
                        "trust_remote_code": loading.pop("trust_remote_code", None)}.items():  # fmt: skip
        if value:
            found[name] = value
    needless = {"task", "torch_dtype", "attn_implementation", "_attn_implementation", "io_config", "dummy_inputs_func",
                "model_class", "model_attributes", "generative"}  # fmt: skip
    for name in (*model, *loading, *hf):
        if name not in needless:
            notes.add(f"input_model.{name}", "has no counterpart; left out")
    return found


def _target(data: Mapping[str, Any], engine: Mapping[str, Any], where: str, notes: Notes) -> dict[str, Any]:
    """Return the target: the first accelerator of the system that the engine names."""
    systems = flat(data.get("systems"))
    named = engine.get("target")
    place = f"systems.{named}" if isinstance(named, str) else "target"
    if isinstance(named, str) and named not in systems:
        raise ConfigError(f"{where}: target: no system is called {named!r}{did_you_mean(named, systems)}")
    system = flat(systems.get(named) if isinstance(named, str) else named)
    kind = str(system.get("type", "LocalSystem"))
    if kind != "LocalSystem":
        notes.add(f"{place}.type", f"{kind} has no counterpart; the workflow runs here")
    accelerators = system.get("accelerators") or []
    if not isinstance(accelerators, list):
        raise ConfigError(f"{where}: {place}.accelerators: expected a list, got {accelerators!r}")
    first = accelerators[0] if accelerators and isinstance(accelerators[0], Mapping) else {}
    if len(accelerators) > 1:
        notes.add(f"{place}.accelerators", "only the first is a target; run the workflow again for each other one")
    providers = first.get("execution_providers") or engine.get("execution_providers") or []
    names = [next(iter(one)) if isinstance(one, Mapping) and one else str(one) for one in providers]
    if len(names) > 1:
        notes.add(f"{place}.accelerators.0.execution_providers", f"only {names[0]} is a target; left out: "
                  f"{', '.join(names[1:])}")  # fmt: skip
    device = str(first.get("device") or "").lower()
    if names:
        fitting = [own for own, provided in PROVIDERS.items() if names[0] in provided]
        if not fitting:
            allowed = ", ".join(name for provided in PROVIDERS.values() for name in provided)
            raise ConfigError(f"{where}: {place}: {names[0]} is not a target here; targets: {allowed}")
        return {"device": fitting[0], "provider": names[0]}
    if device and device not in PROVIDERS:
        raise ConfigError(f"{where}: {place}.accelerators.0.device: {device} is not a target here; use cpu or gpu")
    return {"device": device or "cpu"}


def _evaluators(data: Mapping[str, Any], engine: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """Translate the evaluator that the engine uses, as far as it is lm-eval's."""
    given = flat(data.get("evaluators"))
    used = engine.get("evaluator")
    own = flat(given.get(used)) if isinstance(used, str) else flat(used)
    if isinstance(used, str) and used not in given:
        notes.add("evaluator", f"no evaluator is called {used!r}; nothing is measured")
    if not own:
        return {}
    place = f"evaluators.{used}" if isinstance(used, str) else "evaluator"
    if own.get("type") == "LMEvaluator":
        known = ("tasks", "limit", "batch_size", "num_fewshot", "max_length", "apply_chat_template")
        for name in own:
            if name not in (*known, "type"):
                notes.add(f"{place}.{name}", "has no counterpart; left out")
        options = {name: own[name] for name in known if own.get(name) is not None}
        return {"evaluators": {str(used) if isinstance(used, str) else "lm_eval": {"type": "lm_eval", **options}}}
    for i, metric in enumerate(own.get("metrics") or []):
        kind = metric.get("type") if isinstance(metric, Mapping) else metric
        notes.add(f"{place}.metrics.{i}", f"{kind} is not translated; name what to measure in evaluators and goals")
    return {}


def _search(engine: Mapping[str, Any], steps: list[Any], notes: Notes) -> dict[str, Any]:
    """Translate the search, if there is anything to search over."""
    strategy = flat(engine.get("search_strategy"))
    holes = any(isinstance(step, list) for step in steps) or any(
        isinstance(value, Mapping) and "choice" in value for step in _flat_steps(steps) for value in step.values()
    )
    if not strategy or not holes:
        if strategy:
            notes.add("search_strategy", "no pass has several values, so there is nothing to search")
        return {}
    strategy |= flat(strategy.pop("search_algorithm_config", None))
    name = str(strategy.pop("sampler", None) or strategy.pop("search_algorithm", "tpe"))
    found: dict[str, Any] = {"sampler": SAMPLERS.get(name, "tpe")}
    trials = strategy.pop("max_samples", None) or strategy.pop("num_samples", None) or strategy.pop("max_iter", None)
    if trials:
        found["trials"] = trials
    if strategy.pop("execution_order", "joint") == "pass-by-pass":
        found["order"] = "pass_by_pass"
    if strategy.pop("stop_when_goals_met", False):
        found["stop_on_goals"] = True
    seed = strategy.pop("seed", None)
    for rest in strategy:
        notes.add(f"search_strategy.{rest}", "has no counterpart; left out")
    return {"search": found} | ({"seed": seed} if seed is not None else {})
