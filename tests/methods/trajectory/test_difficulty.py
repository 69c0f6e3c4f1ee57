"""Tests that the range of start epochs grows as published, and that draws stay inside it."""

from __future__ import annotations

import numpy as np
import pytest

from datm_ray.config import StartEpochs
from datm_ray.methods.trajectory.difficulty import draw_origin
from datm_ray.methods.trajectory.iteration import Origin

GROWING = StartEpochs(first=2, bound=6, final_bound=12, expand_iterations=30)


def drawn(experts: int, seed: int, iteration: int) -> Origin:
    """Draws of one iteration of the growing range."""
    return draw_origin(range(GROWING.first, GROWING.upper_bound(iteration)), experts, seed, iteration)


@pytest.mark.parametrize(("initial", "final", "end"), [(10, 20, 1000), (20, 40, 2000), (30, 50, 2000), (15, 20, 7)])
def test_upper_bound_is_the_published_one(initial: int, final: int, end: int) -> None:
    """The upper bound is cur + int((max - cur) * it / end), and max from iteration `end` on."""
    grows = StartEpochs(bound=initial, final_bound=final, expand_iterations=end)
    for iteration in range(3 * end):
        published = min(initial + int((final - initial) * iteration / end), final)
        assert grows.upper_bound(iteration) == published
    assert grows.upper_bound(end - 1) < final == grows.upper_bound(end)


def test_fixed_range_does_not_grow() -> None:
    """A range without iterations of growth stays fixed; its last start is one below the bound."""
    fixed = StartEpochs(first=40, bound=60)
    assert (fixed.last, GROWING.last) == (59, 11)
    assert [fixed.upper_bound(iteration) for iteration in (0, 1, 10_000)] == [60, 60, 60]


def test_draws_fill_the_current_range_and_never_leave_it() -> None:
    """Every start below the bound comes up, the lowest included and the bound excluded, about equally often."""
    for iterations, bound in ((range(0, 5), 6), (range(15, 20), 9), (range(30, 35), 12)):
        starts = [drawn(4, seed, k).epoch for seed in range(200) for k in iterations]
        values, counts = np.unique(starts, return_counts=True)
        assert values.tolist() == list(range(2, bound))
        assert counts.min() > 0.6 * counts.mean()


def test_every_expert_is_visited_once_in_a_sweep() -> None:
    """Every sweep visits each expert once, in an order of its own."""
    sweeps = [[drawn(7, 3, 7 * sweep + k).expert for k in range(7)] for sweep in range(6)]
    assert all(sorted(sweep) == list(range(7)) for sweep in sweeps)
    assert len(set(map(tuple, sweeps))) > 1


def test_plan_has_its_pinned_values() -> None:
    """Experts and starts have pinned values, so that later versions resume a run with equal draws."""
    origins = [drawn(3, 11, k) for k in range(9)]
    assert [origin.expert for origin in origins] == [2, 0, 1, 2, 0, 1, 0, 2, 1]
    assert [origin.epoch for origin in origins] == [4, 2, 2, 4, 3, 2, 4, 2, 5]
