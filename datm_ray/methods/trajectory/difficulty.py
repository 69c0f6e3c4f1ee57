"""Difficulty alignment: which expert epochs may be matched at iteration k (DATM, section 4).

Early epochs teach easy patterns, late epochs hard ones. The range of start epochs (`StartEpochs` in the configuration)
may grow with k, so that easy patterns are learned before hard ones.
"""

from __future__ import annotations

from datm_ray.core.randomness import Purpose, generator
from datm_ray.methods.trajectory.iteration import Origin


def draw_origin(starts: range, experts: int, seed: int, iteration: int, backbone: int = 0) -> Origin:
    """Draw the expert and the start epoch that one backbone matches in one iteration.

    Start epochs are uniform in `starts`. Experts come in shuffled order: every expert is drawn once before any expert
    is drawn twice, as in MTT's program.

    Args:
        starts: start epochs to draw from.
        experts: number of available experts, which are numbered from 0.
        seed: seed of the run.
        iteration: number of the iteration, from 0.
        backbone: index of the backbone, which has draws of its own.
    """
    sweep, position = divmod(iteration, experts)
    order = generator(seed, Purpose.EXPERT_CHOICE, backbone, sweep).permutation(experts)
    start = generator(seed, Purpose.START_EPOCH, backbone, iteration).integers(starts.start, starts.stop)
    return Origin(int(order[position]), int(start))
