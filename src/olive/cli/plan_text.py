"""A plan as text: each step, whether it is cached and why, and what it needs."""

from __future__ import annotations

from collections.abc import Iterator

from olive.cache import Cache
from olive.estimate import Need
from olive.fits import amount, duration, totals
from olive.inventory import items
from olive.lineage import nearest
from olive.plan import Plan, Step
from olive.resources import free_disk

TOLD = 3
"""Differences from the nearest entry that are told of a step; olive cache why tells all."""


def lines(plan: Plan, cache: Cache) -> Iterator[str]:
    """Yield the plan, a line each."""
    yield f"input      {plan.workflow.input_model.path} ({plan.source.kind}, {plan.source_key[:12]})"
    found = items(cache) if any(not step.cached for step in plan.steps) else []
    for step in plan.steps:
        yield f"{'cached' if step.cached else 'run':<10} {step.name} ({step.key[:12]}): {_reason(step, found)}"
        options = ", ".join(f"{k}={v}" for k, v in step.work.model_dump(mode="json", exclude_none=True).items())
        if options:
            yield f"{'':<10} {options}"
        if step.need is not None:
            yield f"{'':<10} {_needs(step.need)}"
    yield f"verify     {plan.workflow.verify.level}"
    yield f"output     {plan.output}"
    whole = totals(plan, cache)
    free = f"{amount(free_disk(cache.root))} free"
    output = amount(whole.output_bytes)
    yield f"disk       {amount(whole.cache_bytes)} in {cache.root} ({free}), {output} for the output"
    yield f"memory     {amount(whole.memory_available)} available"
    if any(not step.cached for step in plan.steps):
        known = (
            f"about {duration(whole.seconds)}, without verification" if whole.seconds is not None else "not known yet"
        )
        yield f"time       {known}"


def _reason(step: Step, found: list) -> str:
    near = None if step.cached else nearest(step.parts, found)
    if near is None:
        return step.reason
    item, differences = near
    told = "; ".join(str(difference) for difference in differences[:TOLD])
    more = f"; and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
    return f"{step.reason}; nearest is {item.key[:12]}: {told}{more}"


def _needs(need: Need) -> str:
    if need.like is None:
        return f"needs at least {amount(need.least_memory)} of memory, {amount(need.disk)} of disk; never run here yet"
    assert need.seconds is not None and need.memory is not None
    like = "" if need.same_options else " with other options"
    basis = f"as on {amount(need.like.input_bytes)} here{like}"
    return (
        f"needs about {duration(need.seconds)}, {amount(need.memory)} of memory, {amount(need.disk)} of disk ({basis})"
    )
