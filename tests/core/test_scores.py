"""Tests DD-Ranking's scores: values computed by hand, and their ranges."""

from __future__ import annotations

import itertools
import math

import pytest

from datm_ray.core.scores import augmentation_robust, label_robust

CORNERS = list(itertools.product((0.0, 1.0), repeat=4))


def lrs(real_hard: float, distilled_hard: float, distilled: float, random_soft: float) -> float:
    return label_robust(
        real_hard=real_hard, distilled_hard=distilled_hard, distilled=distilled, random_soft=random_soft
    )["LRS"]


def ars(distilled: float, random: float, distilled_plain: float, random_plain: float) -> float:
    return augmentation_robust(
        distilled=distilled, random=random, distilled_plain=distilled_plain, random_plain=random_plain
    )["ARS"]


def test_label_robust_score_computed_by_hand() -> None:
    """HLR 0.3 and IOR 0.1 give 0.228454: alpha = 0.05 - 0.15 = -0.1; (0.904837 - 0.367879) / 2.350402."""
    found = label_robust(real_hard=0.9, distilled_hard=0.6, distilled=0.8, random_soft=0.7)
    assert (found["HLR"], found["IOR"]) == pytest.approx((0.3, 0.1))
    assert found["LRS"] == pytest.approx(0.228454, abs=1e-6)


def test_augmentation_robust_score_computed_by_hand() -> None:
    """Improvements 0.2 and 0.4 give 0.417792: beta = 0.1 + 0.2 = 0.3; (1.349859 - 0.367879) / 2.350402."""
    found = augmentation_robust(distilled=0.8, random=0.6, distilled_plain=0.7, random_plain=0.3)
    assert found["beta"] == pytest.approx(0.3)
    assert found["ARS"] == pytest.approx(0.417792, abs=1e-6)


def test_a_set_that_gains_and_loses_nothing_scores_as_documented() -> None:
    """A set no better than random images, that loses nothing against all real data, has 0.269; so has one whose gains
    and losses are equal."""
    zero = (1 - math.exp(-1)) / (math.e - math.exp(-1))
    assert zero == pytest.approx(0.268941, abs=1e-6)
    assert lrs(0.5, 0.5, 0.5, 0.5) == ars(0.5, 0.5, 0.5, 0.5) == pytest.approx(zero)
    assert lrs(1.0, 0.5, 0.9, 0.4) == ars(0.9, 0.4, 0.4, 0.9) == pytest.approx(zero)


@pytest.mark.parametrize("score", [lrs, ars])
def test_scores_lie_between_nought_and_one(score) -> None:  # type: ignore[no-untyped-def]
    """Over all corners of the accuracies' ranges, the smallest score is 0 and the largest is 1."""
    found = [score(*corner) for corner in CORNERS]
    assert min(found) == pytest.approx(0, abs=1e-12)
    assert max(found) == pytest.approx(1)
    assert lrs(0.0, 1.0, 1.0, 0.0) == ars(1.0, 0.0, 1.0, 0.0) == pytest.approx(1)


def test_better_with_hard_labels_or_over_random_is_better() -> None:
    """Each accuracy of the distilled set raises the score; each accuracy of a control lowers it."""
    base = (0.9, 0.5, 0.7, 0.6)
    for place, sign in enumerate((-1, 1, 1, -1)):
        moved = tuple(value + 0.05 * (place == number) for number, value in enumerate(base))
        assert math.copysign(1, lrs(*moved) - lrs(*base)) == sign
    for place, sign in enumerate((1, -1, 1, -1)):
        moved = tuple(value + 0.05 * (place == number) for number, value in enumerate(base))
        assert math.copysign(1, ars(*moved) - ars(*base)) == sign


@pytest.mark.parametrize("percent", [84.8, -0.1, math.nan])
def test_percentage_points_are_refused(percent: float) -> None:
    """Accuracies in percent are refused, because their exponential leaves the score's range."""
    with pytest.raises(ValueError, match="not a fraction"):
        lrs(percent, 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="not a fraction"):
        ars(0.5, percent, 0.5, 0.5)
