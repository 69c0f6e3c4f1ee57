"""Difficulty alignment: which expert epochs may be matched at iteration k (DATM, section 4).

Early epochs teach easy patterns, late epochs hard ones. The range of start epochs (`StartEpochs` in the configuration)
may grow with k, so that easy patterns are learned before hard ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from datm_ray.core.randomness import Purpose, generator


@dataclass(frozen=True)
class MatchPlan:
    """Expert and start epoch that one iteration matches."""

    expert: int
    """Index of the expert in the list of available experts."""
    start: int
    """Start epoch: the expert's epoch whose parameters the student starts from."""


def draw_plan(starts: range, experts: int, seed: int, iteration: int, backbone: int = 0) -> MatchPlan:
    """Draw the expert and the start epoch that one iteration matches.

    Start epochs are uniform in `starts`. Experts come in shuffled order: every expert is drawn once before any expert
    is drawn twice, as published.

    Args:
        starts: start epochs to draw from.
        experts: number of available experts.
        seed: seed of the run.
        iteration: number of the iteration, from 0.
        backbone: index of the backbone, which has draws of its own.
    """
    sweep, position = divmod(iteration, experts)
    order = generator(seed, Purpose.EXPERT_CHOICE, backbone, sweep).permutation(experts)
    start = generator(seed, Purpose.START_EPOCH, backbone, iteration).integers(starts.start, starts.stop)
    return MatchPlan(expert=int(order[position]), start=int(start))
