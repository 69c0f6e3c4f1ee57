"""Difficulty alignment: which expert epochs may be matched at iteration k (DATM, section 4).

Early epochs teach easy patterns, late epochs hard ones. Start epochs are drawn from [lowest, upper_bound(k)). The bound
may grow with k, so that easy patterns are learned before hard ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from datm_ray.core.randomness import Purpose, generator


@dataclass(frozen=True)
class DifficultyRange:
    """The range of start epochs and how its upper bound grows."""

    lowest: int
    """Earliest start epoch, inclusive (T- in the paper)."""
    initial_upper: int
    """Upper bound at iteration 0, exclusive (T in the paper). Equal to `upper` if the range does not grow."""
    upper: int
    """Final upper bound, exclusive (T+ in the paper)."""
    expand_iterations: int
    """Iterations until the final bound is reached; 0 if the range does not grow."""

    def upper_bound(self, iteration: int) -> int:
        """Exclusive upper bound of the start epoch at this iteration."""
        if self.expand_iterations == 0:
            return self.upper
        grown = (self.upper - self.initial_upper) * iteration // self.expand_iterations
        return min(self.upper, self.initial_upper + grown)


@dataclass(frozen=True)
class MatchPlan:
    """Expert and start epoch that one iteration matches."""

    expert: int
    """Index in the list of available experts."""
    start: int
    """Epoch from which the student starts."""


def draw_plan(difficulty: DifficultyRange, experts: int, seed: int, iteration: int, backbone: int = 0) -> MatchPlan:
    """Draw the plan of one iteration: experts in a shuffled order, start epochs uniform in the current range.

    Every expert is drawn once before any is drawn twice, as published. Every backbone has draws of its own.
    """
    sweep, position = divmod(iteration, experts)
    order = generator(seed, Purpose.EXPERT_CHOICE, backbone, sweep).permutation(experts)
    start = generator(seed, Purpose.START_EPOCH, backbone, iteration).integers(
        difficulty.lowest, difficulty.upper_bound(iteration)
    )
    return MatchPlan(expert=int(order[position]), start=int(start))
