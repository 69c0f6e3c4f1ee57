"""How far experts and the student go from a start epoch to its target: the basis of `distill.initial_step_size`.

    expert     learning rate * steps in an epoch * distill.expert_epochs / (1 - momentum)
    student    step size * distill.student_steps

A student that goes much farther than the experts passes its target, and its matching loss exceeds 1. A student that
goes much less far hardly moves. Plans, errors and warnings all take their numbers from this module. Tests:
tests/methods/trajectory/test_calibration.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from datm_ray.config import RunConfig
from datm_ray.words import counted

BEST = 0.5
"""Ratio of the student's distance to the experts' distance at which a search for the step size starts.

The first matching loss was measured to be smallest at ratios of 0.3 to 0.5 on digits with 1, 10 and 30 images per
class, and of 1/100 to 1/16 on 32x32 photos with 1 image per class. BEST is the largest of these ratios."""
TOO_FAR, TOO_NEAR = 2.0, 1 / 256
"""Ratios of the student's distance to the experts' distance, exclusive: a plan gives advice above TOO_FAR or below
TOO_NEAR.

Measured first matching losses at ratio 2: 1.4 to 73. On photos with 1 image per class: 0.95, the smallest, at ratio
1/16, and 0.99 at 1/256. On digits: 0.9 at 1/16."""


@dataclass(frozen=True)
class Distance:
    """Steps and learning rates of the experts and of the student from a start epoch to its target."""

    title: ClassVar[str] = "step sizes"

    steps_per_epoch: int
    """Number of an expert's SGD steps in an epoch; with `experts.curriculum`, the mean over epochs to match."""
    expert_epochs: int
    """Number of an expert's epochs from start to target."""
    learning_rate: float
    """The experts' learning rate."""
    momentum: float
    """The experts' momentum in [0, 1)."""
    student_steps: int
    step_size: float | None
    """The student's step size; `None` if it is found before the first iteration."""

    @classmethod
    def of(cls, config: RunConfig, training_images: int) -> Distance:
        """Make the `Distance` from a recipe: steps and learning rates from a start epoch to its target.

        Args:
            training_images: number of images that experts are trained on, without validation images.
        """
        experts, settings = config.experts, config.distill
        seen = experts.share_seen(range(settings.start_epochs.first, config.latest_matched))
        return cls(
            math.ceil(training_images * seen / experts.batch_size),
            settings.expert_epochs,
            experts.learning_rate,
            experts.momentum,
            settings.student_steps,
            settings.initial_step_size,
        )

    @property
    def expert(self) -> float:
        """Distance of an expert from start to target: learning rate * number of steps / (1 - momentum)."""
        return self.learning_rate * self.steps_per_epoch * self.expert_epochs / (1 - self.momentum)

    @property
    def likely_step_size(self) -> float:
        """Step size at which `find_step_size` starts: the one with which `ratio` is `BEST`.

        In measurements the best step size was near this one or smaller.
        """
        return BEST * self.expert / self.student_steps

    @property
    def ratio(self) -> float:
        """Student's distance divided by the expert's. If `step_size` is `None`, `likely_step_size` is used."""
        return self.student_steps * (self.step_size or self.likely_step_size) / self.expert

    def __str__(self) -> str:
        momentum = f" with momentum {self.momentum:.3g}" if self.momentum else ""
        experts = f"{counted(self.steps_per_epoch * self.expert_epochs, 'step')} of {self.learning_rate:.3g}{momentum}"
        student = counted(self.student_steps, "step")
        if self.step_size is None:
            student += f" of a size found before the first iteration, up to about {self.likely_step_size:.1g}"
        else:
            student += f" of {self.step_size:.3g} ({self.student_steps * self.step_size:.3g} in all)"
        return f"experts make {experts} from start to target ({self.expert:.3g} in all), the student {student}"

    @property
    def advice(self) -> str:
        """Advice on `distill.initial_step_size` if `ratio` is above `TOO_FAR` or below `TOO_NEAR`; otherwise ""."""
        if TOO_NEAR <= self.ratio <= TOO_FAR:
            return ""
        times = f"{self.ratio:.2g} times as far" if self.ratio > 1 else f"{1 / self.ratio:.2g} times less far"
        return f"that is {times}: try distill.initial_step_size=null, or up to about {self.likely_step_size:.1g}"

    def lines(self) -> list[str]:
        """Lines for the user: the expert's and the student's distance, then the advice if there is any."""
        return [str(self), *([self.advice] if self.advice else [])]

    def to_json(self) -> dict[str, float | None]:
        """Experts' "steps_per_epoch", distances "expert" and "student", and "likely_step_size", as plain data.

        "student" is `None` if the step size is found before the first iteration.
        """
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "expert": self.expert,
            "student": None if self.step_size is None else self.student_steps * self.step_size,
            "likely_step_size": self.likely_step_size,
        }
