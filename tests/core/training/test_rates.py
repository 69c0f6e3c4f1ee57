"""Tests learning rates against torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from datm_ray.core.training.loop import Schedule
from datm_ray.core.training.rates import share_of_rate

STEPS, WARMUP = 60, 15


def torchs(schedule: str, warmup: int) -> list[float]:
    """Rates of torch's schedulers at a rate of 1, one for each step."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    parts: list[LRScheduler] = [LinearLR(optimiser, start_factor=0.01, total_iters=warmup)] if warmup else []
    if schedule == "cosine":
        parts.append(CosineAnnealingLR(optimiser, STEPS - warmup))
    scheduler = SequentialLR(optimiser, parts, [warmup]) if len(parts) == 2 else parts[0] if parts else None
    rates = []
    for _ in range(STEPS):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_rates_equal_those_of_torchs_schedulers(schedule: str, warmup: int) -> None:
    """Each step has the rate of LinearLR, then of CosineAnnealingLR, both stepped once a step."""
    ours = [share_of_rate(step, STEPS, warmup, cosine=schedule == "cosine") for step in range(STEPS)]
    assert ours == pytest.approx(torchs(schedule, warmup), abs=1e-12)
    assert ours[0] == (0.01 if warmup else 1.0)
    assert ours[warmup] == 1.0


def test_a_schedules_rate_has_warm_up_decay_and_cosine() -> None:
    """The rate of a step joins warm-up with the decay halfway, or with the cosine; without either it is constant."""
    assert [Schedule(4, 8, 0.5).rate(step) for step in range(4)] == [0.5] * 4
    step = Schedule(4, 8, 0.5, decay_epoch=2, warmup_epochs=1)
    rates = [step.rate(number, steps_per_epoch=2) for number in range(8)]
    assert rates == pytest.approx([0.5 * 0.01, 0.5 * 0.505, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05])
    cosine = Schedule(30, 8, 1.0, cosine=True, warmup_epochs=7)
    rates = [cosine.rate(number, steps_per_epoch=2) for number in range(STEPS)]
    assert rates == pytest.approx([share_of_rate(number, STEPS, 14, cosine=True) for number in range(STEPS)])
