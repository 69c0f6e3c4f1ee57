"""Counter-based randomness: every draw is a function of (seed, purpose, counters) alone.

There is no global generator whose state must be saved. Iteration k draws the same numbers whether or not iteration k-1
ran in this process, so a resumed run equals an uninterrupted run. Draws are made for the global batch and then sliced,
so they do not depend on the number of shards. The generator is numpy's Philox on the CPU, so a GPU run draws the same
numbers as a CPU run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

import numpy as np

Drawn = TypeVar("Drawn")


class Purpose(IntEnum):
    """Purposes of random streams. The values decide the random numbers: append new purposes, never change old ones."""

    INITIAL_PARAMETERS = 1
    TRAINING_ORDER = 2
    TRAINING_AUGMENTATION = 3
    REAL_SAMPLES = 4
    EXPERT_CHOICE = 5
    START_EPOCH = 6
    STUDENT_ORDER = 7
    STUDENT_AUGMENTATION = 8
    EXPERT = 9
    EVALUATION = 10
    VALIDATION = 11
    META_IMAGES = 12
    FRESH_NETWORK = 13
    REAL_BATCH = 14
    SHARED_AUGMENTATION = 15
    INITIAL_NOISE = 16
    RECOVERY_VIEW = 17
    RECOVERY_NOISE = 18
    CUTMIX = 19
    LABEL_VIEWS = 20
    SELECTION_ORDER = 21
    SELECTION_CROPS = 22
    RECOVERY_META = 23
    PRIOR = 24
    META_AUGMENTATION = 25


def generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """Make a new random generator whose numbers depend on the seed, the purpose and the counters alone.

    Args:
        seed: seed of the run, the expert or the evaluation, in [0, 2**64).
        purpose: purpose of the draws; separates streams with equal seed and counters.
        counters: at most three non-negative integers, the most significant first, such as (epoch, batch). A purpose
            must always have the same number of counters, because (5,) and (0, 5) give the same stream.

    Raises:
        ValueError: there are more than three counters.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array(_words(counters), np.uint64))
    )


def _words(counters: tuple[int, ...]) -> list[int]:
    """Philox's initial counter, four 64-bit words: 0, then `counters`, the last one first, filled up with zeros."""
    if len(counters) > 3:
        raise ValueError(f"at most three counters fit beside the block index, got {len(counters)}")
    return [0, *reversed(counters)] + [0] * (3 - len(counters))


class _Kept(threading.local):
    """Random generator that a thread keeps between calls of `drawn`; `None` before the first and during each call."""

    random: np.random.Generator | None = None


_kept = _Kept()


def drawn(draw: Callable[[np.random.Generator], Drawn], seed: int, purpose: Purpose, *counters: int) -> Drawn:
    """Call `draw` with a random generator for this seed, purpose and counters, and return the result of `draw`.

    The random numbers are those that `generator` would give for the same arguments. To save time, each thread keeps a
    generator and sets its state anew in every call. So `draw` must not keep the generator after it returns. It may
    itself call `drawn`. More than three counters raise a `ValueError`.
    """
    random, _kept.random = _kept.random or np.random.Generator(np.random.Philox(0)), None
    random.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _words(counters), "key": (seed, purpose)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # the end of the buffer: the next draw fills it
        "has_uint32": 0,
        "uinteger": 0,
    }
    try:
        return draw(random)
    finally:
        _kept.random = random


def derive_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Derive a seed in [0, 2**63), such as expert 7's, from another seed, a purpose and up to three counters.

    More than three counters raise a `ValueError`.
    """
    return drawn(lambda random: int(random.integers(2**63)), seed, purpose, *counters)
