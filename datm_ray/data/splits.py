"""Split images into training, validation and test sets: by roles that files' names state, and by stratified splits.

A stratified split is equal on every machine, in every run and with every version of numpy. Each image gets a 64-bit key
from a fixed stream; in every class the images with the smallest keys are held out. Only raw generator output is used,
because numpy may change its shuffles between versions. The run's seed has no effect: runs with different seeds must be
judged on the same images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datm_ray.errors import DatasetError
from datm_ray.words import counted, listed, percent

Role = Literal["train", "test", "val"]

TEST_FRACTION = 0.2
"""Share of each class's images that becomes the test set if a source has no test set."""
_ROLES: dict[str, Role] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_ROLES |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


def role_of(*names: str) -> Role | None:
    """Role of a file: train, test or val, as stated by the first of `names` that states one; `None` if none does.

    A name states a role if it contains whole words for one role only, in upper or lower case. "train-00000" states
    one; "retrain" and "train_test_split" state none.

    Args:
        names: name of a file or folder, then the name of its parent folder, and so on.
    """
    for name in names:
        words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
        roles = {_ROLES[word] for word in map(str.lower, words) if word in _ROLES}
        if len(roles) == 1:
            return roles.pop()
    return None


def went_where(train: Sequence[str], test: Sequence[str], unused: Sequence[str]) -> str:
    """Line for the user that lists the files or folders of training images, of test images, and the unused ones.

    If `test` is empty, the line states the share of training images that becomes the test set.
    """
    held_out = listed(test, 3) if test else f"a fixed {percent(TEST_FRACTION)} of each class of these"
    parts = {"training images": listed(train, 3), "test images": held_out, "not used": listed(unused, 3)}
    return "; ".join(f"{name}: {text}" for name, text in parts.items() if text)


class Stream(IntEnum):
    """Seed of the random keys by which a split chooses test or validation images; other seeds would split otherwise."""

    TEST = 1
    VALIDATION = 2


def stratified_split(
    labels: NDArray[np.int64],  # labels [n]
    fraction: float,
    stream: Stream,
    class_names: Sequence[str],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ascending indices of the images kept [n - m] and of the images held out [m].

    In each class the share `fraction`, in (0, 1), is held out. The number is rounded; at least one image is held out,
    and at least one is kept. `class_names` gives the number of classes, and their names for messages.

    Raises:
        DatasetError: a class has fewer than two images.
    """
    keys = np.random.Philox(key=int(stream)).random_raw(len(labels))
    is_held_out = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        _require_two(len(members), name, stream)
        count = held_out(len(members), fraction)
        is_held_out[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def held_out(members: int, fraction: float) -> int:
    """Number of a class's `members` images to hold out: the share `fraction`, rounded, but 1 to `members` - 1."""
    return min(max(1, int(fraction * members + 0.5)), members - 1)


def _require_two(members: int, name: str, stream: Stream) -> None:
    if members < 2:
        raise DatasetError(
            f"class {name!r} has {counted(members, 'image')} left, too few to split off a {stream.name.lower()} set",
            "Training, validation and test set each need at least one image of every class",
            "Add images of this class or leave the class out",
        )
