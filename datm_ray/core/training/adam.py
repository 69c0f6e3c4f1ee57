"""Adam as a function, for trainings that save Adam's moments with the rest of their state.

Tests: tests/methods/test_recovery.py, tests/core/test_prior.py, against `torch.optim.Adam`.
"""

from __future__ import annotations

import math

from torch import Tensor

EPS = 1e-8
"""Constant in Adam's update that is added to the denominator, so that the division stays finite."""


def adam_step(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    rate: float,
    done: int,
    decays: tuple[float, float] = (0.9, 0.999),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one step as `torch.optim.Adam` does. Returns the new value and both new moments.

    Args:
        value: variable of any shape.
        gradient: gradient of a loss with respect to the variable.
        moments: running means of the gradient and of its square; zeros before the first step.
        rate: learning rate of this step.
        done: number of steps before this one.
        decays: decays of the moments, in [0, 1).
    """
    first = moments[0].lerp(gradient, 1 - decays[0])
    second = decays[1] * moments[1] + (1 - decays[1]) * gradient.square()
    root = second.sqrt() / math.sqrt(1 - decays[1] ** (done + 1)) + EPS
    return value.addcdiv(first, root, value=-rate / (1 - decays[0] ** (done + 1))), first, second
