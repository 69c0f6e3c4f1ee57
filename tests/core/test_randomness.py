"""Tests that streams of random numbers are functions of their counters, and part of a run's identity."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from threading import Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from datm_ray.core.randomness import Purpose, derive_seed, drawn, generator


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
    for draw in (generator, lambda *place: drawn(lambda random: random.random(), *place)):
        with pytest.raises(ValueError, match=r"at most three counters .* got 4"):
            draw(0, Purpose.EXPERT, 1, 2, 3, 4)


DRAWS: dict[str, Callable[[np.random.Generator], Any]] = {
    "permutation": lambda random: random.permutation(37),
    "of rows": lambda random: random.permutation(np.arange(3, 20)),
    "float32": lambda random: random.random((5, 3), np.float32),
    "float64": lambda random: random.random(7),
    "32 bits": lambda random: random.integers(5, size=3, dtype=np.int32),
    "one of few": lambda random: random.integers(6),
    "64 bits": lambda random: random.integers(2**63),
    "normal": lambda random: random.standard_normal(9, np.float32),
    "beta": lambda random: random.beta(1.0, 1.0, 4),
    "mixed": lambda random: [random.integers(6), *random.random(3, np.float32), random.permutation(5)[0]],
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_a_kept_generator_are_those_of_a_new_one(name: str) -> None:
    """A kept generator draws the same numbers for all seeds, purposes and counters, whatever was drawn before."""
    seeds, places = [0, 1, 2**32, 2**63, 2**64 - 1], [(), (0,), (7, 3), (1, 2, 3), (2**64 - 1, 0, 2**40)]
    for seed in seeds:
        for purpose in Purpose:
            for place in places:
                found, expected = drawn(DRAWS[name], seed, purpose, *place), generator(seed, purpose, *place)
                assert np.array_equal(found, DRAWS[name](expected))


def test_a_held_generator_does_not_change_when_others_draw() -> None:
    """Draws within draws, in other threads, and beside generators that a caller holds do not meet."""
    held, other = (generator(1, Purpose.EXPERT, place) for place in (0, 1))
    whole = [generator(1, Purpose.EXPERT, place).random(6) for place in (0, 1)]
    within = list[NDArray[np.float64]]()

    def nested(random: np.random.Generator) -> NDArray[np.float64]:
        first = random.random(3)
        within.append(drawn(lambda inner: inner.random(6), 1, Purpose.EXPERT, 1))
        thread = Thread(target=lambda: within.append(drawn(lambda inner: inner.random(6), 1, Purpose.EXPERT, 1)))
        thread.start()
        thread.join()
        return np.concatenate([first, random.random(3)])

    parts = [(held.random(), other.random(), drawn(nested, 1, Purpose.EXPERT, 0)) for _ in range(6)]
    for place in (0, 1):
        assert np.array_equal([each[place] for each in parts], whole[place])
    assert all(np.array_equal(each[2], whole[0]) for each in parts)
    assert len(within) == 12
    assert all(np.array_equal(each, whole[1]) for each in within)


def test_a_draw_that_fails_leaves_the_next_one_alone() -> None:
    """After an error within a draw, the same numbers are drawn as before."""
    with pytest.raises(ZeroDivisionError):
        drawn(lambda random: random.random() / 0, 1, Purpose.EXPERT, 0)
    assert drawn(lambda random: random.random(), 1, Purpose.EXPERT, 0) == generator(1, Purpose.EXPERT, 0).random()


def test_derived_seeds_are_valid_and_distinct() -> None:
    """Derived seeds have 63 bits, which torch and numpy accept, and give different streams."""
    seeds = [derive_seed(0, Purpose.EVALUATION, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = [numbers(0, seed=seed)[0] for seed in seeds]
    assert all(a != b for a, b in pairwise(sorted(first)))
