"""Tests that streams of random numbers are functions of their counters, and part of a run's identity."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from datm_ray.core.randomness import Purpose, derive_seed, generator


def numbers(*place: int, seed: int = 3, purpose: Purpose = Purpose.EXPERT) -> NDArray[np.int64]:
    return generator(seed, purpose, *place).integers(2**62, size=4)


def test_streams_have_their_pinned_values() -> None:
    """Streams give pinned numbers, so that later versions repeat a finished run."""
    assert generator(7, Purpose.STUDENT_ORDER, 3, 1).permutation(8).tolist() == [1, 6, 7, 0, 3, 4, 5, 2]
    assert generator(2**63, Purpose.TRAINING_AUGMENTATION, 1, 2, 3).random(2).tolist() == [
        0.7534251124408035,
        0.7970505797922813,
    ]
    assert derive_seed(1, Purpose.EXPERT, 5) == 8205266801234360991
    assert derive_seed(0, Purpose.INITIAL_PARAMETERS) == 7501867102099269819


def test_purposes_keep_their_numbers() -> None:
    """Purposes have pinned numbers; a new purpose goes to the end, because renumbering changes every run."""
    assert [purpose.name for purpose in Purpose][:11] == [
        "INITIAL_PARAMETERS",
        "TRAINING_ORDER",
        "TRAINING_AUGMENTATION",
        "REAL_SAMPLES",
        "EXPERT_CHOICE",
        "START_EPOCH",
        "STUDENT_ORDER",
        "STUDENT_AUGMENTATION",
        "EXPERT",
        "EVALUATION",
        "VALIDATION",
    ]
    assert [int(purpose) for purpose in Purpose] == list(range(1, len(Purpose) + 1))


def test_drawing_elsewhere_changes_nothing() -> None:
    """A stream's numbers do not depend on what was drawn before, from it or from others."""
    undisturbed = numbers(4, 1)
    numbers(4, 0)
    generator(3, Purpose.EXPERT, 4, 1).random(10_000)
    np.random.default_rng().random(3)
    assert np.array_equal(numbers(4, 1), undisturbed)


def test_seed_purpose_and_every_counter_separate_streams() -> None:
    """Seed, purpose and every counter each select another stream."""
    places = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    drawn = [numbers(*place, seed=seed, purpose=purpose) for place in places for seed in (0, 1) for purpose in Purpose]
    assert len(np.unique(np.concatenate(drawn))) == 4 * len(drawn)


def test_long_streams_do_not_run_into_the_next() -> None:
    """Neighbouring streams lie 2**64 blocks apart, so none continues another."""
    long, following = (generator(1, Purpose.EXPERT, step).integers(2**62, size=50_000) for step in (0, 1))
    assert not np.intersect1d(long, following).size


def test_more_than_three_counters_are_refused() -> None:
    """A stream takes at most three counters, which is the generator's capacity."""
    with pytest.raises(ValueError, match=r"at most three counters .* got 4"):
        generator(0, Purpose.EXPERT, 1, 2, 3, 4)


def test_derived_seeds_are_valid_and_distinct() -> None:
    """Derived seeds have 63 bits, which torch and numpy accept, and give different streams."""
    seeds = [derive_seed(0, Purpose.EVALUATION, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = [numbers(0, seed=seed)[0] for seed in seeds]
    assert all(a != b for a, b in pairwise(sorted(first)))
