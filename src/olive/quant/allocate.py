"""Choose one setting per unit so that the sum of losses is least under a budget of bytes, or the other way round.

This is the multiple-choice knapsack problem (Sinha and Zoltners, 1979). Losses add up, and so do sizes; then dynamic
programming over the bytes in use is exact. Sizes of weights are multiples of large powers of two, which keeps the table
small; where they are not, bytes are counted in coarser steps, rounded up, and exchanges of single settings use up what
the rounding left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 1 << 18
"""Entries of the table; a model of 10 GB is then counted in steps of 40 kB or finer."""


@dataclass(frozen=True)
class Choice:
    """What one setting of a unit costs."""

    size: int
    """Bytes."""
    loss: float
    """What it adds to the divergence."""


Units = Sequence[Sequence[Choice]]


def least_loss(units: Units, capacity: int) -> list[int] | None:
    """Return the index of each unit's choice with the least sum of losses among those of at most ``capacity`` bytes
    together; None if even the smallest do not fit."""
    slack = capacity - sum(min(c.size for c in unit) for unit in units)
    if slack < 0:
        return None
    table = _Table(units, slack)
    return _exchange(units, table.choices(table.last), capacity, math.inf)


def least_size(units: Units, limit: float) -> list[int] | None:
    """Return the index of each unit's choice with the least sum of sizes among those whose losses sum up to at most
    ``limit``; None if even the least losses exceed it."""
    if sum(min(c.loss for c in unit) for unit in units) > limit:
        return None
    slack = sum(max(c.size for c in unit) - min(c.size for c in unit) for unit in units)
    table = _Table(units, slack)
    enough = np.flatnonzero(table.best <= limit)
    if not len(enough):  # a sum in another order may miss the limit by rounding
        return [min(enumerate(unit), key=lambda item: (item[1].loss, item[1].size))[0] for unit in units]
    return _exchange(units, table.choices(int(enough[0])), -1, limit)


class _Table:
    """The least loss of all units within s steps above their smallest sizes, for every s."""

    def __init__(self, units: Units, slack: int) -> None:
        self.units = units
        self.extra = [[c.size - min(d.size for d in unit) for c in unit] for unit in units]
        step = math.gcd(*(size for unit in self.extra for size in unit)) or 1
        self.step = max(step, -(-slack // (STATES - 1)))
        self.last = slack // self.step
        self.best = np.zeros(self.last + 1)
        self.picked: list[np.ndarray] = []
        for unit, extra in zip(units, self.extra, strict=True):
            found = np.full(self.last + 1, np.inf)
            picked = np.zeros(self.last + 1, dtype=np.int16)
            for i, (choice, size) in enumerate(zip(unit, extra, strict=True)):
                steps = -(-size // self.step)
                if steps > self.last:
                    continue
                loss = self.best[: self.last + 1 - steps] + choice.loss
                better = loss < found[steps:]
                found[steps:][better] = loss[better]
                picked[steps:][better] = i
            self.best = found
            self.picked.append(picked)

    def choices(self, state: int) -> list[int]:
        """Return the choices behind the least loss within ``state`` steps."""
        chosen = []
        for picked, extra in zip(reversed(self.picked), reversed(self.extra), strict=True):
            choice = int(picked[state])
            chosen.append(choice)
            state -= -(-extra[choice] // self.step)
        return chosen[::-1]


def _exchange(units: Units, chosen: list[int], capacity: int, limit: float) -> list[int]:
    """Exchange single choices while that lowers the loss within ``capacity``, or the size within ``limit``."""
    size = sum(unit[i].size for unit, i in zip(units, chosen, strict=True))
    loss = math.fsum(unit[i].loss for unit, i in zip(units, chosen, strict=True))
    smaller = capacity < 0
    while True:
        best, where = (0.0, 0.0), None
        for u, unit in enumerate(units):
            now = unit[chosen[u]]
            for i, choice in enumerate(unit):
                gain = (float(now.size - choice.size), now.loss - choice.loss)
                fits = loss - gain[1] <= limit if smaller else size - gain[0] <= capacity
                gain = gain if smaller else gain[::-1]
                if fits and gain[0] >= 0 and gain > best:
                    best, where = gain, (u, i)
        if where is None:
            return chosen
        u, i = where
        size += units[u][i].size - units[u][chosen[u]].size
        loss += units[u][i].loss - units[u][chosen[u]].loss
        chosen[u] = i
