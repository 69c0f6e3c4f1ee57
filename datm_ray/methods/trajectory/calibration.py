"""Calibration before the first iteration: the initial matching losses, and the step size with the smallest losses.

A loss is computed from the student's steps, without a derivative, and costs about a quarter of an iteration. At step
size 0 the loss is 1, because the student stays at its start. If small steps lead towards the target, the loss falls
with a growing step size, then rises without bound as the student passes the target. If small steps lead away from the
target, the loss rises from 1 on, and no step size is best. Tests: tests/methods/trajectory/test_calibration.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from datm_ray.core.synthetic import AllSum, SyntheticSet, identity
from datm_ray.methods.trajectory.iteration import Match

PAIRS = 4
"""Number of pairs (start, target) of expert parameters whose matching losses are measured for each backbone.

The start epochs of the pairs are spread over the range from which the first iteration draws."""
MOST_TRIED = 12
"""Largest number of step sizes that `find_step_size` tries. Halving each time reaches 1/2048 of the first step size."""
LEAST_FALL = 0.005
"""Smallest amount by which a step size must lower the mean loss below 1 to count as the best one, inclusive.

A student that does not move has a loss of 1. A student that moves straight to its target reaches this amount after a
quarter of a percent of the way."""


@dataclass(frozen=True)
class Measured:
    """Matching losses of one backbone at one step size."""

    step_size: float
    losses: tuple[float, ...]
    """Matching loss of each pair (start, target): inf if it overflows, nan if start and target are identical."""
    least_tried: float = math.nan
    """Smallest step size that `find_step_size` tried; nan if the losses were measured at one given step size."""
    most_tried: float = math.nan
    """Largest step size that `find_step_size` tried; nan if the losses were measured at one given step size."""
    least_loss: float = math.nan
    """Smallest mean loss of the step sizes that `find_step_size` tried; nan if one given step size was measured."""

    @property
    def is_best(self) -> bool:
        """True if a step size that `find_step_size` tried has a mean loss below 1 by at least `LEAST_FALL`."""
        return self.least_loss <= 1 - LEAST_FALL

    @property
    def loss(self) -> float:
        """Mean of `losses` over the pairs whose start and target differ; nan if there are none."""
        found = [loss for loss in self.losses if not math.isnan(loss)]
        return statistics.fmean(found) if found else math.nan


def measure(step_size: float, pairs: Sequence[Match], synthetic: SyntheticSet, all_sum: AllSum = identity) -> Measured:
    """Compute one backbone's matching loss at a step size for every pair of start and target.

    The step sizes in `synthetic` are not read. All class shards get equal losses.

    Args:
        step_size: the student's step size.
        pairs: the backbone's matches, each with a start and a target.
        synthetic: the synthetic set, or this class shard's part of it.
        all_sum: function that sums a tensor over class shards (workers with different classes).
    """
    tried = replace(synthetic, step_sizes=torch.full_like(synthetic.step_sizes, step_size))
    losses = []
    for pair in pairs:
        loss = pair.gradient(tried, all_sum, skip_above=-math.inf).loss
        losses.append(math.nan if pair.is_still else loss if math.isfinite(loss) else math.inf)
    return Measured(step_size, tuple(losses))


def find_step_size(measured_at: Callable[[float], Measured], near: float, bound: float = 1.0) -> Measured:
    """Search for the student's step size with the smallest mean matching loss. Returns the losses at that step size.

    At most `MOST_TRIED` step sizes are tried.

    The search starts at `near` and goes down, then up, by factors of two until the loss rises. It also goes down while
    the loss is above 1, because the loss is 1 at step size 0. Then it tries the vertex of the parabola through the best
    step size and its neighbours. If the student moves straight to the target, the loss is a parabola in the step size.

    If no loss is below 1 by `LEAST_FALL`, no step size is best, and the smallest step sizes hardly move the student.
    The result is then the largest step size tried whose loss is at most `bound`. If all losses are above `bound`, the
    result is the step size with the smallest loss.

    Args:
        measured_at: measures the losses at a step size.
        near: first step size to try.
        bound: largest acceptable mean loss if no step size is best.
    """
    tried: dict[float, Measured] = {}

    def loss(step_size: float) -> float:
        if step_size not in tried:
            tried[step_size] = measured_at(step_size)
        return tried[step_size].loss

    best = near
    # Two infinite losses compare as equal, so the search goes down.
    while len(tried) < MOST_TRIED and (loss(best / 2) <= loss(best) or loss(best) > 1):
        best /= 2
    while len(tried) < MOST_TRIED and loss(best * 2) <= loss(best):
        best *= 2
    if len(tried) < MOST_TRIED:
        below, here, above = (min(loss(best * factor), 1e6) for factor in (0.5, 1.0, 2.0))
        left, right = here - below, here - above
        if left + right / 2 < 0:
            loss(best - best / 2 * (right / 4 - left) / (right / 2 + left))
    found = min(tried.values(), key=lambda each: each.loss)
    found = replace(found, least_loss=found.loss)
    if not found.is_best:
        bounded = [each for each in tried.values() if each.loss <= bound]
        found = replace(max(bounded, key=lambda each: each.step_size, default=found), least_loss=found.loss)
    return replace(found, least_tried=min(tried), most_tried=max(tried))
