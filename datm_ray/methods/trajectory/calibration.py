"""Before the first iteration: the matching losses that a set starts with, and the step size that makes them least.

Only the student's steps are computed, no derivative of the loss, so a loss costs about a quarter of an iteration. Near
step size 0 the loss is near 1, because the student stays at its start. With the step size it falls while the student
comes closer to the target, and rises without bound where the student passes it. Tests:
tests/methods/trajectory/test_calibration.py.
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
"""Pairs of start and target, spread over the range of start epochs, whose losses are measured."""
MOST_TRIED = 7
"""Step sizes that a search tries at most."""


@dataclass(frozen=True)
class Measured:
    """Matching losses of one backbone at a step size."""

    step_size: float
    losses: tuple[float, ...]
    """Loss of each pair. inf if the student overflows, nan if start and target are identical."""
    least_tried: float = math.nan
    """Smallest step size that a search tried; nan without a search."""
    most_tried: float = math.nan
    """Largest step size that a search tried; nan without a search."""

    @property
    def loss(self) -> float:
        """Mean loss, without pairs whose start and target are identical; nan if there are no others."""
        found = [loss for loss in self.losses if not math.isnan(loss)]
        return statistics.fmean(found) if found else math.nan


def measure(step_size: float, pairs: Sequence[Match], synthetic: SyntheticSet, all_sum: AllSum = identity) -> Measured:
    """Matching losses of a backbone's pairs with a step size; class shards get equal ones."""
    tried = replace(synthetic, step_sizes=torch.full_like(synthetic.step_sizes, step_size))
    losses = []
    for pair in pairs:
        loss = pair.gradient(tried, all_sum, skip_above=-math.inf).loss
        is_still = torch.equal(pair.start, pair.target)
        losses.append(math.nan if is_still else loss if math.isfinite(loss) else math.inf)
    return Measured(step_size, tuple(losses))


def find_step_size(measured_at: Callable[[float], Measured], near: float) -> Measured:
    """Step size whose mean loss is least among at most `MOST_TRIED`.

    The search goes from `near` by factors of two, down and up, until the loss rises. Then it tries the vertex of the
    parabola through the last three: along a straight way to the target, the loss is a parabola in the step size.
    """
    tried: dict[float, Measured] = {}

    def loss(step_size: float) -> float:
        if step_size not in tried:
            tried[step_size] = measured_at(step_size)
        return tried[step_size].loss

    best = near
    for factor in (0.5, 2.0):
        # At equal losses, which are infinite, it goes down.
        while len(tried) < MOST_TRIED and loss(best * factor) <= loss(best):
            best *= factor
    if len(tried) < MOST_TRIED:
        below, here, above = (min(loss(best * factor), 1e6) for factor in (0.5, 1.0, 2.0))
        left, right = here - below, here - above
        if left + right / 2 < 0:
            loss(best - best / 2 * (right / 4 - left) / (right / 2 + left))
    found = min(tried.values(), key=lambda each: each.loss)
    return replace(found, least_tried=min(tried), most_tried=max(tried))
