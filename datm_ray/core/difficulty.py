"""Difficulty alignment: which expert epochs may be matched at iteration k (DATM, section 4).

Early epochs teach easy patterns, late epochs hard ones. Starts are drawn from [lowest, upper_bound(k)); the bound
may float upwards, so that easy patterns are learned before hard ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from datm_ray.core.randomness import Purpose, generator


@dataclass(frozen=True)
class DifficultyRange:
    """The range of start epochs and how its upper bound grows."""

    lowest: int
    """Earliest start epoch, inclusive (the paper's T-)."""
    initial_upper: int
    """Upper bound at iteration 0, exclusive (T). Equal to `upper` where the range does not grow."""
    upper: int
    """Final upper bound, exclusive (T+)."""
    expand_iterations: int
    """Iterations until the final bound is reached; 0 where the range does not grow."""

    def upper_bound(self, iteration: int) -> int:
        """First start epoch that may not be drawn at this iteration."""
        if self.expand_iterations == 0:
            return self.upper
        grown = (self.upper - self.initial_upper) * iteration // self.expand_iterations
        return min(self.upper, self.initial_upper + grown)


@dataclass(frozen=True)
class MatchPlan:
    """What one iteration matches: the student starts at `start` of `expert` and aims at `start + span`."""

    expert: int
    """Position in the list of available experts."""
    start: int
    """Start epoch."""


def draw_plan(difficulty: DifficultyRange, experts: int, seed: int, iteration: int, backbone: int = 0) -> MatchPlan:
    """The plan of one iteration: experts in a shuffled sweep, start epochs uniform in the current range.

    As published, every expert is visited once before any is visited twice. Every backbone has draws of its own.
    """
    sweep, position = divmod(iteration, experts)
    order = generator(seed, Purpose.EXPERT_CHOICE, backbone, sweep).permutation(experts)
    start = generator(seed, Purpose.START_EPOCH, backbone, iteration).integers(
        difficulty.lowest, difficulty.upper_bound(iteration)
    )
    return MatchPlan(expert=int(order[position]), start=int(start))
