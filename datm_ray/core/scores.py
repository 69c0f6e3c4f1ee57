"""Scores of a distilled set that separate its images from its soft labels and from augmentation.

The label-robust score (LRS) and the augmentation-robust score (ARS) of DD-Ranking, from their published formulas:

    HLR  = acc(real, hard labels) - acc(distilled, hard labels)              hard-label recovery, lower is better
    IOR  = acc(distilled, own labels) - acc(random, labels of the same kind) improvement over random
    LRS  = s(w IOR - (1 - w) HLR)
    beta = g (distilled - random, both augmented) + (1 - g) (distilled - random, neither augmented)
    ARS  = s(beta)                                     s(a) = (exp(a) - exp(-1)) / (exp(1) - exp(-1)),   w = g = 1/2

All accuracies are fractions in [0, 1], so both scores lie in [0, 1]: s(-1) = 0 and s(1) = 1. A set that is no better
than random images, and loses nothing against all real data, has s(0) = 0.269. DD-Ranking's program (0.2.0) instead puts
percentage points into the exponential, so that its numbers have no fixed range.
"""

from __future__ import annotations

import math

WEIGHT = 0.5
"""DD-Ranking's weight w of the improvement over random (IOR) in the label-robust score, and weight g of accuracies with
augmentation in the augmentation-robust score."""


def label_robust(*, real_hard: float, distilled_hard: float, distilled: float, random_soft: float) -> dict[str, float]:
    """Compute the label-robust score and its parts.

    Returns three numbers by name. "LRS" is the score in [0, 1]; higher is better. "HLR" is the hard-label recovery in
    [-1, 1]: the accuracy of all real data minus that of the set, both with hard labels; lower is better. "IOR" is the
    improvement over random in [-1, 1]: the accuracy of the set minus that of random images, both with soft labels.

    Args:
        real_hard: accuracy with all real data and hard labels. All accuracies are in [0, 1].
        distilled_hard: accuracy with the distilled images and hard labels.
        distilled: accuracy with the distilled images and the soft labels of the set.
        random_soft: accuracy with random real images and soft labels.

    Raises:
        ValueError: an accuracy is not in [0, 1], such as an accuracy in percent.
    """
    _require_fractions(real_hard, distilled_hard, distilled, random_soft)
    hlr, ior = real_hard - distilled_hard, distilled - random_soft
    return {"LRS": _normalised(WEIGHT * ior - (1 - WEIGHT) * hlr), "HLR": hlr, "IOR": ior}


def augmentation_robust(
    *, distilled: float, random: float, distilled_plain: float, random_plain: float
) -> dict[str, float]:
    """Compute the augmentation-robust score from accuracies with soft labels.

    Returns two numbers by name. "ARS" is the score in [0, 1]; higher is better. "beta" is the number in [-1, 1] from
    which the score follows: the accuracy of the set minus that of random images, averaged over training with and
    without augmentation.

    Args:
        distilled, random: accuracies of distilled and of random real images with augmentation, in [0, 1].
        distilled_plain, random_plain: the two accuracies without augmentation, in [0, 1].

    Raises:
        ValueError: an accuracy is not in [0, 1], such as an accuracy in percent.
    """
    _require_fractions(distilled, random, distilled_plain, random_plain)
    beta = WEIGHT * (distilled - random) + (1 - WEIGHT) * (distilled_plain - random_plain)
    return {"ARS": _normalised(beta), "beta": beta}


def _normalised(value: float) -> float:
    """Map a score a in [-1, 1] onto [0, 1] as DD-Ranking does: (exp(a) - exp(-1)) / (exp(1) - exp(-1))."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _require_fractions(*values: float) -> None:
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not a fraction from 0 to 1")
