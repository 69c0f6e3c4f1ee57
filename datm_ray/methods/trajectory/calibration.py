"""Calibration before the first iteration: the initial matching losses, and the step size with the smallest losses.

A loss is computed from the student's steps, without its derivative, and costs about a quarter of an iteration. At step
size 0 the loss is 1, because the student stays at its start. With a growing step size the loss falls while the student
comes closer to the target, then rises without bound as the student passes the target. Tests:
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
"""Number of pairs of start and target whose losses are measured, spread over the range of start epochs."""
MOST_TRIED = 7
"""Largest number of step sizes that `find_step_size` tries."""


@dataclass(frozen=True)
class Measured:
    """Matching losses of one backbone at one step size."""

    step_size: float
    losses: tuple[float, ...]
    """Loss of each pair: inf if the student overflows, nan if start and target are identical."""
    least_tried: float = math.nan
    """Smallest step size that `find_step_size` tried; nan if the losses were measured at one given step size."""
    most_tried: float = math.nan
    """Largest step size that `find_step_size` tried; nan if the losses were measured at one given step size."""

    @property
    def loss(self) -> float:
        """Mean loss over the pairs whose start and target differ; nan if there are none."""
        found = [loss for loss in self.losses if not math.isnan(loss)]
        return statistics.fmean(found) if found else math.nan


def measure(step_size: float, pairs: Sequence[Match], synthetic: SyntheticSet, all_sum: AllSum = identity) -> Measured:
    """Compute one backbone's matching loss at a step size for every pair of start and target.

    All class shards get equal losses.
    """
    tried = replace(synthetic, step_sizes=torch.full_like(synthetic.step_sizes, step_size))
    losses = []
    for pair in pairs:
        loss = pair.gradient(tried, all_sum, skip_above=-math.inf).loss
        losses.append(math.nan if pair.is_still else loss if math.isfinite(loss) else math.inf)
    return Measured(step_size, tuple(losses))


def find_step_size(measured_at: Callable[[float], Measured], near: float) -> Measured:
    """Search for the step size with the smallest mean loss, trying at most `MOST_TRIED`. Returns the losses at it.

    The search starts at `near` and goes down, then up, by factors of two until the loss rises. Then it tries the vertex
    of the parabola through the best step size and its neighbours. If the student moves straight to the target, the loss
    is a parabola in the step size.

    Args:
        measured_at: measures the losses at a step size.
        near: first step size to try.
    """
    tried: dict[float, Measured] = {}

    def loss(step_size: float) -> float:
        if step_size not in tried:
            tried[step_size] = measured_at(step_size)
        return tried[step_size].loss

    best = near
    for factor in (0.5, 2.0):
        # Infinite losses are equal; the search then goes down.
        while len(tried) < MOST_TRIED and loss(best * factor) <= loss(best):
            best *= factor
    if len(tried) < MOST_TRIED:
        below, here, above = (min(loss(best * factor), 1e6) for factor in (0.5, 1.0, 2.0))
        left, right = here - below, here - above
        if left + right / 2 < 0:
            loss(best - best / 2 * (right / 4 - left) / (right / 2 + left))
    found = min(tried.values(), key=lambda each: each.loss)
    return replace(found, least_tried=min(tried), most_tried=max(tried))
