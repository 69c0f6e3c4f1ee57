"""Which real images experts see in an epoch, if they are trained from easy images to hard ones (PAD, arXiv 2408.03360).

In the first epochs experts see only the easiest images of each class; their share grows until they see all images.
Later the easiest images may be left out. What is easy comes from scores (`stages/experts/difficulty.py`). An epoch's
images depend only on the scores and the epoch's number; the training shows them in random order. Tests:
tests/core/training/test_curriculum.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datm_ray.config import CurriculumConfig


@dataclass(frozen=True)
class Curriculum:
    """Real training images of each class ordered from easy to hard, and which of them experts see in an epoch."""

    settings: CurriculumConfig
    by_class: Sequence[NDArray[np.int64]]
    """For each class, the indices of its images in the data set, the easiest first."""

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """Indices of the images that experts see in an epoch: at least one of each class. Epochs count from 0."""
        first, last = self.settings.bounds(epoch)
        return np.concatenate([own[_part(len(own), first, last)] for own in self.by_class])


def _part(count: int, first: float, last: float) -> slice:
    """Slice of the images from share `first` to share `last`, in [0, 1], of `count` images; at least one image.

    Both ends are rounded down, as published.
    """
    start = min(int(first * count), count - 1)
    return slice(start, max(int(last * count), start + 1))
