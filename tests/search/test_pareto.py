"""Ranking and the Pareto front against slow, obvious versions."""

from __future__ import annotations

import itertools
import random

import pytest

from olive.search.pareto import best, dominates, far_behind, front


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_front_is_what_comparing_all_pairs_gives(axes: int) -> None:
    rng = random.Random(axes)
    for _ in range(50):
        points = {i: tuple(float(rng.randrange(4)) for _ in range(axes)) for i in range(9)}
        expected = []
        for i, own in points.items():
            beaten = False
            for other in points.values():
                better = [a < b for a, b in zip(other, own, strict=True)]
                worse = [a > b for a, b in zip(other, own, strict=True)]
                beaten = beaten or (any(better) and not any(worse))
            if not beaten and own not in [points[j] for j in expected]:
                expected.append(i)
        assert front(points) == expected
        for a, b in itertools.combinations(front(points), 2):
            assert not dominates(points[a], points[b])
            assert not dominates(points[b], points[a])


def test_best_goes_by_the_first_objective_then_the_next_then_the_earlier_trial() -> None:
    assert best({3: (1.0, 9.0), 5: (1.0, 2.0), 7: (1.0, 2.0), 9: (2.0, 0.0)}) == 5
    assert best({}) is None


def test_far_behind_needs_one_that_is_nowhere_worse() -> None:
    assert far_behind((2.0, 5.0), [(1.0, 5.0)], 0.5) == (1.0, 5.0)
    assert far_behind((1.5, 5.0), [(1.0, 5.0)], 0.5) is None  # behind, but not far
    assert far_behind((9.0, 4.0), [(1.0, 5.0)], 0.5) is None  # better in the second
    assert far_behind((-1.0,), [(-4.0,)], 0.5) == (-4.0,)  # maximized: 1 against 4
