"""The choice of settings against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from olive.quant import allocate
from olive.quant.allocate import Choice, least_loss, least_size

Units = list[list[Choice]]


def made(seed: int, multiple: int = 1) -> Units:
    """Make 2 to 5 units of 1 to 4 choices: random sizes that ``multiple`` divides, random losses, often equal ones."""
    rng = random.Random(seed)
    return [
        [
            Choice(multiple * rng.randrange(1, 40), rng.choice([0.0, 0.5, rng.random()]))
            for _ in range(rng.randint(1, 4))
        ]
        for _ in range(rng.randint(2, 5))
    ]


def total(units: Units, chosen: list[int]) -> tuple[int, float]:
    return sum(u[i].size for u, i in zip(units, chosen)), sum(u[i].loss for u, i in zip(units, chosen))  # noqa: B905


def everything(units: Units) -> list[tuple[int, float]]:
    return [total(units, list(chosen)) for chosen in itertools.product(*(range(len(u)) for u in units))]


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_size_loses_less(seed: int) -> None:
    units = made(seed, multiple=random.Random(seed).choice([1, 64]))
    whole = everything(units)
    for capacity in sorted({size + more for size, _ in whole[:5] for more in (-1, 0, 30)}):
        fitting = [loss for size, loss in whole if size <= capacity]
        chosen = least_loss(units, capacity)
        assert (chosen is None) == (not fitting)
        if chosen is not None:
            size, loss = total(units, chosen)
            assert size <= capacity
            assert loss == pytest.approx(min(fitting), abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_loss_is_smaller(seed: int) -> None:
    units = made(seed)
    whole = everything(units)
    for limit in sorted({loss + more for _, loss in whole[:5] for more in (-0.1, 1e-9, 0.3)}):
        fitting = [size for size, loss in whole if loss <= limit]
        chosen = least_size(units, limit)
        assert (chosen is None) == (not fitting)
        if chosen is not None:
            size, loss = total(units, chosen)
            assert loss <= limit + 1e-12
            assert size == min(fitting)


@pytest.mark.parametrize("seed", range(20))
def test_coarse_steps_keep_the_size_and_lose_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    units = [[Choice(rng.randrange(1000, 9000), 2.0**-i) for i in range(4)] for _ in range(5)]
    units = [sorted(unit, key=lambda c: -c.loss) for unit in units]
    units = [[Choice(s, c.loss) for s, c in zip(sorted(x.size for x in u), u, strict=True)] for u in units]
    monkeypatch.setattr(allocate, "STATES", 64)
    whole = everything(units)
    capacity = sorted(size for size, _ in whole)[len(whole) // 2]
    chosen = least_loss(units, capacity)
    assert chosen is not None
    size, loss = total(units, chosen)
    assert size <= capacity
    # Each unit's size is rounded up by less than a step, so what fits with five steps to spare is found.
    step = -(-(capacity - sum(u[0].size for u in units)) // 63)
    assert loss <= min(found for size, found in whole if size <= capacity - 5 * step)


def test_a_model_of_thousands_of_units_takes_seconds() -> None:
    rng = random.Random(0)
    units = [[Choice(rng.randrange(10**6, 10**7), rng.random()) for _ in range(13)] for _ in range(256)]
    chosen = least_loss(units, 10**9)
    assert chosen is not None
    size, loss = total(units, chosen)
    assert size <= 10**9
    # No multiplier bounds the optimum from below by more (Lagrangian duality); the gap is within a percent.
    bound = max(
        sum(min(c.loss + price * c.size for c in unit) for unit in units) - price * 10**9
        for price in (10**-6.0 * 1.1**i for i in range(-60, 20))
    )
    assert bound <= loss <= 1.01 * bound
