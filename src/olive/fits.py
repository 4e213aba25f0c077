"""Whether a plan fits this machine: what its steps write against the free disk, what they hold against the memory."""

from __future__ import annotations

from dataclasses import dataclass

from olive.cache import Cache
from olive.errors import ConfigError
from olive.estimate import Weights, after, least_memory, weights
from olive.passes import pass_class
from olive.passes.base import Pass
from olive.plan import Plan
from olive.resources import available_memory, existing, free_disk

DATA_FREE = ("rtn", "hqq")
"""Quantizers that hold one tensor at a time."""
FEW_ROWS = 16


@dataclass(frozen=True)
class Totals:
    """What a whole plan takes, and what there is."""

    cache_bytes: int
    """Written to the cache by the steps that run."""
    output_bytes: int
    """Written beside the output, where its files cannot share their bytes with the cache."""
    least_memory: int
    memory_available: int
    seconds: float | None
    """Of the steps that run; None as long as one of them has never run here."""


def totals(plan: Plan, cache: Cache) -> Totals:
    """Add up what the steps of a plan take."""
    needs = [step.need for step in plan.steps if step.need is not None]
    seconds = [need.seconds for need in needs]
    return Totals(
        sum(need.disk for need in needs),
        _output_bytes(plan, cache),
        max((need.least_memory for need in needs), default=0),
        available_memory(),
        None if None in seconds else sum(second for second in seconds if second is not None),
    )


def _sizes(plan: Plan) -> list[Weights]:
    """Return the sizes of the source, and of what each step makes."""
    found = [weights(plan.source)]
    for step in plan.steps:
        found.append(after(step.work, found[-1], plan.workflow.target.execution_provider()))
    return found


def _output_bytes(plan: Plan, cache: Cache) -> int:
    graph = plan.steps[-1].work.produces == "onnx"  # onnx refuses to read weights that have several hard links
    shared = _one_disk(plan, cache) and (not graph or not cache.kept)
    return 0 if shared else _sizes(plan)[-1].size


def _one_disk(plan: Plan, cache: Cache) -> bool:
    return existing(plan.output.parent).stat().st_dev == existing(cache.root).stat().st_dev


def check(plan: Plan, cache: Cache) -> None:
    """Refuse a plan that cannot fit, with what would."""
    found = totals(plan, cache)
    _check_disk(plan, cache, found)
    for number, (step, sizes) in enumerate(zip(plan.steps, _sizes(plan), strict=False)):
        if step.need is not None and step.need.least_memory > found.memory_available:
            hint = _less_memory(step.work, sizes, plan.compute_device, found.memory_available)
            raise ConfigError(
                f"passes.{number}: {step.name} holds at least {amount(step.need.least_memory)} in memory at once, and "
                f"{amount(found.memory_available)} are available; {hint}"
            )


def _check_disk(plan: Plan, cache: Cache, found: Totals) -> None:
    out, same = plan.output.parent, _one_disk(plan, cache)
    wanted = {cache.root: found.cache_bytes + (found.output_bytes if same else 0)}
    if not same:
        wanted[out] = found.output_bytes
    for place, needed in wanted.items():
        free = free_disk(place)
        if needed <= free:
            continue
        what = "the steps' results" if place == cache.root else "the output"
        if place == cache.root and found.output_bytes and same:
            what += " and the output"
        ways = ["free some"]
        if place == cache.root and cache.kept:
            ways += ["olive cache gc --max_size SIZE removes old steps", "set OLIVE_CACHE_DIR to a larger disk"]
            if not same and free_disk(out) >= found.cache_bytes:
                ways.append("--no_cache works on the output's disk")
        else:
            ways.append("give an output on a larger disk")
        raise ConfigError(
            f"{place}: {what} take {amount(needed)}, and {amount(free)} are free on that disk; {'; '.join(ways)}"
        )


def _less_memory(step: Pass, sizes: Weights, device: str, available: int) -> str:
    """Say what would fit: fewer rows, another pass, a quantized base, another machine."""
    ways = []
    data = getattr(step, "data", None)
    if data is not None and "bits" in type(step).model_fields:
        fewer = step.model_copy(update={"data": data.model_copy(update={"max_samples": FEW_ROWS})})
        if least_memory(fewer, sizes, device) <= available:
            ways.append(f"fewer rows would fit: data.max_samples={FEW_ROWS}")
        for name in DATA_FREE:
            least = least_memory(pass_class(name)(), sizes, device)
            if least <= available:
                ways.append(f"{name} would fit: it holds {amount(least)}")
                break
    elif sizes.linear_bits >= 16 and "rank" in type(step).model_fields:
        ways.append("quantize the base first, which is trained on as it is packed: olive quantize")
    return "; ".join([*ways, "or use a machine with more"])


def amount(count: float) -> str:
    """Return a number of bytes as people say it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
