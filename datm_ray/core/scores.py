"""Scores that ask what a distilled set is worth apart from its soft labels and its augmentation.

The label-robust score (LRS) and the augmentation-robust score (ARS) of DD-Ranking, from their published formulas:

    HLR  = acc(real, hard labels) - acc(distilled, hard labels)              hard-label recovery, the less the better
    IOR  = acc(distilled, own labels) - acc(random, labels of the same kind) improvement over random
    LRS  = s(w IOR - (1 - w) HLR)
    beta = g (distilled - random, both augmented) + (1 - g) (distilled - random, neither augmented)
    ARS  = s(beta)                                     s(a) = (exp(a) - exp(-1)) / (exp(1) - exp(-1)),   w = g = 1/2

All accuracies are fractions, so that both scores lie in [0, 1]: s(-1) = 0, s(1) = 1, and s(0), a set that is no better
than random images and loses nothing to all real data, is 0.269. DD-Ranking's program (0.2.0) put percentage points into
the exponential, which gives numbers beyond any range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WEIGHT = 0.5
"""Of DD-Ranking, for both scores."""


@dataclass(frozen=True)
class LabelRobust:
    """LRS and its parts."""

    hlr: float
    """Hard-label recovery, in [-1, 1]: what is lost against all real data when labels are hard; less is better."""
    ior: float
    """Improvement over random images with labels of the same kind, in [-1, 1]."""
    score: float
    """In [0, 1]."""


@dataclass(frozen=True)
class AugmentationRobust:
    """ARS and what it is made of."""

    beta: float
    """Mean improvement over random images with and without augmentation, in [-1, 1]."""
    score: float
    """In [0, 1]."""


def label_robust(
    *, real_hard: float, distilled_hard: float, distilled: float, random_soft: float, weight: float = WEIGHT
) -> LabelRobust:
    """The label-robust score.

    Args:
        real_hard: accuracy with all real data and hard labels, in [0, 1] as all others.
        distilled_hard: with the distilled images and hard labels.
        distilled: with the distilled images and their own labels.
        random_soft: with random real images and labels of the same kind.
        weight: of the improvement over random; the rest is that of the recovery.

    Raises:
        ValueError: an accuracy or the weight is not in [0, 1], such as one in percent.
    """
    _require_fractions(real_hard, distilled_hard, distilled, random_soft, weight)
    hlr, ior = real_hard - distilled_hard, distilled - random_soft
    return LabelRobust(hlr, ior, _normalised(weight * ior - (1 - weight) * hlr))


def augmentation_robust(
    *, distilled: float, random: float, distilled_plain: float, random_plain: float, weight: float = WEIGHT
) -> AugmentationRobust:
    """The augmentation-robust score.

    Args:
        distilled, random: accuracies with augmentation, in [0, 1] as all others; labels of the same kind.
        distilled_plain, random_plain: without.
        weight: of the difference with augmentation; the rest is that of the one without.

    Raises:
        ValueError: an accuracy or the weight is not in [0, 1], such as one in percent.
    """
    _require_fractions(distilled, random, distilled_plain, random_plain, weight)
    beta = weight * (distilled - random) + (1 - weight) * (distilled_plain - random_plain)
    return AugmentationRobust(beta, _normalised(beta))


def _normalised(value: float) -> float:
    """[-1, 1] onto [0, 1], better sets spread wider."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _require_fractions(*values: float) -> None:
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is no fraction from 0 to 1")
