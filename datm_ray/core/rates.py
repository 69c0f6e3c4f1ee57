"""Learning rates over a training: a linear warm-up, then constant or a cosine down to 0.

The rate is a function of the step alone, so a resumed training has the rates of an undisturbed one. Every step has a
rate of its own; torch's schedulers, stepped once a step, give the same ones.

Tests: tests/core/test_rates.py.
"""

from __future__ import annotations

import math

FIRST_SHARE = 0.01
"""Share of the learning rate in the first step of a warm-up, as published for SRe2L."""


def share_of_rate(step: int, steps: int, warmup: int = 0, *, cosine: bool = False) -> float:
    """Share of the learning rate in a step, in [0, 1].

    The share grows linearly from `FIRST_SHARE` to 1 over the warm-up. Then it stays 1, or follows a cosine that reaches
    0 after the last step.

    Args:
        step: number of the step, from 0.
        steps: steps of the whole training.
        warmup: steps of the warm-up, fewer than all.
        cosine: False for a constant rate after the warm-up.
    """
    if step < warmup:
        return FIRST_SHARE + (1 - FIRST_SHARE) * step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2 if cosine else 1.0
