"""Which trials are best. Trials that failed, were dropped or miss a hard goal never are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Objectives = tuple[float, ...]
"""Figures to be minimized, the most important first."""


def dominates(one: Objectives, other: Objectives) -> bool:
    """Tell whether ``one`` is nowhere worse than ``other`` and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def front(candidates: Mapping[int, Objectives]) -> list[int]:
    """Return the numbers of the candidates that no other dominates; of equal ones the first."""
    kept: list[int] = []
    for number, own in sorted(candidates.items()):
        beaten = any(dominates(other, own) for other in candidates.values())
        if not beaten and not any(candidates[earlier] == own for earlier in kept):
            kept.append(number)
    return kept


def best(candidates: Mapping[int, Objectives]) -> int | None:
    """Return the number of the best candidate: by the first objective, ties by the next, then the earlier one."""
    return min(candidates, key=lambda number: (candidates[number], number), default=None)


def far_behind(own: Objectives, others: Iterable[Objectives], far: float) -> Objectives | None:
    """Return one of the others that ``own`` is nowhere better than and somewhere worse than by ``far``, relative."""
    for other in others:
        pairs = list(zip(own, other, strict=True))
        if all(a >= b for a, b in pairs) and any(a - b > far * abs(b) for a, b in pairs):
            return other
    return None
