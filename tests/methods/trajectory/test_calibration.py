"""Tests the search for a student's step size, and the arithmetic of distances."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from datm_ray.config import override
from datm_ray.core.synthetic import AllSum, identity
from datm_ray.methods.trajectory.calibration import MOST_TRIED, Measured, find_step_size, measure
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.methods.trajectory.iteration import Match
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient, place_steps
from datm_ray.recipes import get_recipe
from tests.methods.trajectory.test_matching import Barrier, eager, make_problem

LOSSES: dict[str, tuple[Callable[[float], float], float, float]] = {
    "at the guess": (lambda x: (1 - x) ** 2, 1.0, 1e-9),
    "between": (lambda x: (1 - x / 0.7) ** 2, 0.7, 1e-9),
    "below": (lambda x: (1 - x / 0.09) ** 2, 0.09, 1e-9),
    "above": (lambda x: (1 - x / 7) ** 2, 7.0, 1e-9),
    "before an explosion": (lambda x: 1 - x if x < 1.5 else math.inf, 1.0, 0.5),
    "below an overflow": (lambda x: (1 - x / 0.2) ** 2 if x < 0.4 else math.inf, 0.2, 0.5),
    "far below": (lambda x: 1 + 0.9 * ((1 - x / 0.004) ** 2 - 1), 0.004, 1e-9),
    "below a ripple": (lambda x: 6 - x if x > 0.3 else (1 - x / 0.1) ** 2, 0.1, 0.05),
}
"""Loss as a function of the step size, its minimum, and how far from it the search may end."""


def test_a_search_ends_at_the_least_loss() -> None:
    """A search from 1 finds the minimum of a parabola, in few trials, and does not stop at an overflow."""
    for case, (loss, least, tolerance) in LOSSES.items():
        tried: list[float] = []

        def at(step_size: float, tried: list[float] = tried, loss: Callable[[float], float] = loss) -> Measured:
            tried.append(step_size)
            return Measured(step_size, (loss(step_size), math.nan, loss(step_size)))

        found = find_step_size(at, 1.0)
        assert found.step_size == pytest.approx(least, abs=tolerance), case
        assert found.loss == found.least_loss == min(map(loss, tried)), case
        assert found.is_best, case
        assert len(tried) == len(set(tried)) <= MOST_TRIED, case
        assert (found.least_tried, found.most_tried) == (min(tried), max(tried)), case


NO_LEAST: dict[str, tuple[Callable[[float], float], float]] = {
    "rising": (lambda x: (1 + x) ** 2, 0.05),
    "flat below, rising above": (lambda x: 1 + (x - 0.01) ** 2 - 0.0001, 0.34),
    "falling by a thousandth": (lambda x: (1 - x / 0.4) ** 2 * 0.001 + 0.999, 1.1),
}
"""Loss as a function of the step size that is nowhere clearly below 1, and the largest step size with a loss of 1.1."""


def test_a_search_without_a_best_step_size_says_so_and_lets_the_student_move() -> None:
    """A loss that only rises or is flat leads to the largest tried step size below the bound, not to the smallest of
    all; the least loss is reported, and one that overflows everywhere is infinite."""
    for case, (loss, most) in NO_LEAST.items():
        found = find_step_size(lambda x, loss=loss: Measured(x, (loss(x),)), 1.0, bound=1.1)  # type: ignore[misc]
        assert not found.is_best, case
        assert most / 2 <= found.step_size <= max(most, 1.0), case
        assert 0.995 < found.least_loss <= found.loss <= 1.1, case
    infinite = find_step_size(lambda x: Measured(x, (math.inf,)), 1.0, bound=1.1)
    assert (infinite.is_best, infinite.loss) == (False, math.inf)
    above = find_step_size(lambda x: Measured(x, (2 + x,)), 1.0, bound=1.1)
    assert (above.is_best, above.step_size) == (False, above.least_tried)


def test_shards_find_the_step_size_of_one_process() -> None:
    """Class shards find the step size and the losses of one process, and all of them the same."""
    network, start, _, synthetic = make_problem()
    steps = [draw_student_steps(12, 2, 6, "scale", seed=1, iteration=iteration) for iteration in range(2)]
    weights, ends = torch.full((6,), 1 / 6, dtype=torch.float64), []
    for drawn in steps:  # two steps of the student itself, so that some step size arrives
        end = start
        for step in drawn:
            end = end - 0.3 * eager(network).forward(
                end, synthetic.images[step.rows], synthetic.soft_labels[step.rows], weights
            )
        ends.append(end)
    barrier, bounds = Barrier(2), [(0, 3), (3, 12)]

    def searched(first: int, last: int, all_sum: AllSum) -> Measured:
        rows = {name: getattr(synthetic, name)[first:last] for name in ("images", "soft_labels", "labels")}
        functions, held = eager(make_problem()[0]), replace(synthetic, **rows)  # a network for each thread
        drawn = [place_steps([step.held_by(first, last) for step in each], None, start) for each in steps]
        pairs = [Match(functions, start, end, each) for end, each in zip(ends, drawn, strict=True)]
        return find_step_size(lambda tried: measure(tried, pairs, held, all_sum), 0.2)

    whole = searched(0, 12, identity)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda rank: searched(*bounds[rank], functools.partial(barrier.all_sum, rank)), (0, 1)))
    assert parts[0] == parts[1]
    assert (parts[0].step_size, *parts[0].losses) == pytest.approx((whole.step_size, *whole.losses), rel=1e-9)
    assert whole.loss < 0.5


def test_a_pair_at_rest_is_left_out() -> None:
    """A pair whose start and target are identical has no loss and is not part of the mean."""
    network, start, target, synthetic = make_problem()
    steps = place_steps(draw_student_steps(12, 2, 5, "", seed=1, iteration=0), None, start)
    at_rest, moving = (Match(eager(network), start, end, steps) for end in (start, target))
    found = measure(0.1, [at_rest, moving], synthetic)
    assert math.isnan(found.losses[0])
    assert found.loss == found.losses[1] > 0
    assert math.isnan(measure(0.1, [at_rest], synthetic).loss)


def test_losses_before_the_first_iteration_count_matched_parameters_alone() -> None:
    """The search measures the loss without the parameters that are left out, and a pair at rest in all others."""
    network, start, target, synthetic = make_problem()
    steps = place_steps(draw_student_steps(12, 2, 5, "", seed=1, iteration=0), None, start)
    first = len(start) // 3
    match = Match(eager(network), start, target, steps, first=first)
    at = float(synthetic.step_size)
    measured = measure(at, [match], synthetic).loss
    assert measured == matching_gradient(match.functions, start, target, synthetic, steps, first=first).loss
    assert measured != measure(at, [replace(match, first=0)], synthetic).loss
    only_shallow = torch.cat([target[:first], start[first:]])
    assert math.isnan(measure(at, [replace(match, target=only_shallow)], synthetic).loss)


def test_distances_are_those_of_plain_sgd() -> None:
    """A distance is a number of steps times their size, with momentum more, and advice comes where both differ much."""
    few = ["experts.batch_size=256", "experts.learning_rate=0.01", "distill.expert_epochs=2"]
    config = override(get_recipe("digits-ipc1"), [*few, "distill.initial_step_size=0.01"])
    found = Distance.of(config, 780)
    assert str(found) == (
        "experts make 8 steps of 0.01 from start to target (0.08 in all), the student 40 steps of 0.01 (0.4 in all)"
    )
    assert (found.ratio, found.likely_step_size) == pytest.approx((5.0, 0.001))
    assert found.advice == "that is 5 times as far: try distill.initial_step_size=null, or up to about 0.001"
    fast = Distance.of(override(config, ["experts.momentum=0.9"]), 780)
    assert (fast.expert, fast.advice) == (pytest.approx(0.8), "")
    assert "experts make 8 steps of 0.01 with momentum 0.9 from start to target (0.8 in all)" in str(fast)
    easy = override(config, ["experts.curriculum={first_share: 0.25, whole_from: 12, removals: []}"])
    assert Distance.of(easy, 780).steps_per_epoch == 2  # 0.59 of 780 images, on average over epochs 0 to 10
    wild = Distance.of(override(config, ["experts.learning_rate=37028123456", "distill.student_steps=1"]), 780)
    assert "8 steps of 3.7e+10 from" in str(wild)
    assert str(wild).endswith("the student 1 step of 0.01 (0.01 in all)")
    slow = Distance.of(override(config, ["distill.initial_step_size=0.000006"]), 780)
    assert slow.advice.startswith("that is 333 times less far: try".replace("333", "3.3e+02"))
    for least in (1 / 16, 1 / 32):  # where photos at IPC 1 have their smallest first loss
        found = override(config, [f"distill.initial_step_size={least * 0.08 / 40}"])
        assert not Distance.of(found, 780).advice, least
    free = Distance.of(override(config, ["distill.initial_step_size=null"]), 780)
    assert str(free).endswith("the student 40 steps of a size found before the first iteration, up to about 0.001")
    assert (free.ratio, free.advice) == (0.5, "")
