"""Learning rates of a training: a linear warm-up, then a constant rate or a cosine down to 0.

The rate is a function of the step alone, so a resumed training has the same rates as an uninterrupted one. Warm-up and
cosine change the rate at every step. torch's schedulers give the same rates if they are stepped once per step.

Tests: tests/core/training/test_rates.py.
"""

from __future__ import annotations

import math

FIRST_SHARE = 0.01
"""Learning rate in the first step of a warm-up, as a share of the full learning rate, as published for SRe2L."""


def share_of_rate(step: int, steps: int, warmup: int = 0, *, cosine: bool = False) -> float:
    """Learning rate in a step, as a share in [0, 1] of the full rate.

    The share grows linearly from `FIRST_SHARE` to 1 over the warm-up. Then it stays 1, or follows a cosine that reaches
    0 after the last step.

    Args:
        step: number of the step, from 0.
        steps: number of steps of the whole training.
        warmup: number of steps of the warm-up, smaller than `steps`.
        cosine: True for a cosine after the warm-up, False for a constant rate.
    """
    if step < warmup:
        return FIRST_SHARE + (1 - FIRST_SHARE) * step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2 if cosine else 1.0
