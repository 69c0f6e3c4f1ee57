"""Labels of a teacher: a network in training learns the logits that a trained network has for the same images.

The loss of a batch is the mean over images of

    T^2 KL(softmax(z / T) || softmax(z' / T)).

The teacher's logits are z, the network's are z', and T is a temperature. CutMix replaces a box of every image by the
same box of another image of the batch. Both networks see the mixed images, so labels need no mixing. Shapes: b images,
c h w image, k classes. References: arXiv 1503.02531 (the loss), 1905.04899 (CutMix), 2306.13092 (SRe2L, which trains on
its images in this way). Tests: tests/core/training/test_teacher.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.core.images.batches import Batch, batches
from datm_ray.core.randomness import Purpose, generator


@dataclass(frozen=True)
class Teacher:
    """A trained network that labels every batch when it is needed."""

    network: nn.Module
    """The teacher; it is put into evaluation mode, and its parameters need no gradient."""
    temperature: float = 20.0
    """Temperature T, above 0, by which logits are divided in the loss."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of the share of each image that CutMix keeps; 0 for no CutMix."""
    at_once: int | None = None
    """Largest number of images that the teacher labels at a time; `None` for all images of a batch."""

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    def batches(self, images: Tensor, seed: int, epochs: range, batch_size: int, augmentation: str) -> Iterator[Batch]:
        """Yield batches of some epochs: augmented, mixed images [1 b c h w], and the teacher's logits for them [1 b k].

        Args:
            images: [n c h w] images of the set.
            seed: seed of order, augmentation and CutMix.
            epochs: numbers of the epochs, from 0.
            batch_size: number b of images; the last batch of an epoch may be smaller.
            augmentation: strategy such as "crop_flip": each batch gets one of its operations; "" for none.
        """
        none = torch.zeros(len(images), device=next(self.network.parameters()).device)
        number = 0
        for epoch, is_last, x, _ in batches([images], [none], [seed], epochs, batch_size, augmentation):
            seen = self.mixed(x[0], seed, epoch, number)
            with torch.no_grad():
                logits = torch.cat([self.network(part) for part in seen.split(self.at_once or len(seen))])
            yield Batch(epoch, is_last, seen[None], logits[None])
            number = 0 if is_last else number + 1

    def mixed(self, images: Tensor, seed: int, epoch: int, batch: int) -> Tensor:
        """Images [b c h w] after CutMix; unchanged if `cutmix` is 0. `batch` is the batch's number in the epoch."""
        if not self.cutmix:
            return images
        size = (images.shape[2], images.shape[3])
        return mix(images, draw_cutmix(self.cutmix, len(images), size, generator(seed, Purpose.CUTMIX, epoch, batch)))


class Labels(Protocol):
    """Stored views of a set's images and a teacher's logits for them, such as `datm_ray.ReplayedLabels`."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the training, from 0, whose views and logits `batch` returns."""
        ...

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Views [b c h w] of the images at these indices in the chosen epoch, and logits [b k] of the views."""
        ...


@dataclass(frozen=True)
class StoredLessons:
    """Stored views of the images and a teacher's logits for them, in place of a `Teacher` that labels each batch.

    The images come in the same order as with a `Teacher`.
    """

    labels: Labels
    temperature: float = 20.0
    """Temperature T, above 0, by which logits are divided in the loss."""

    def batches(self, images: Tensor, seed: int, epochs: range, batch_size: int, augmentation: str) -> Iterator[Batch]:
        """Yield batches of some epochs: stored views [1 b c h w], and a teacher's logits for them [1 b k].

        Args:
            images: give only their number.
            seed: seed of the order.
            epochs: numbers of the epochs, from 0.
            batch_size: number b of views; the last batch of an epoch may be smaller.
            augmentation: not read, since the views are already augmented and mixed.
        """
        count = len(images)
        for epoch in epochs:
            self.labels.set_epoch(epoch)
            order = generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(count)
            for first in range(0, count, batch_size):
                x, logits = self.labels.batch(order[first : first + batch_size])
                yield Batch(epoch, first + batch_size >= count, x[None], logits[None])


Lessons = Teacher | StoredLessons
"""Source of images and a teacher's logits for them, for every step of a training."""


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Loss [] of logits [b k] against a teacher's logits `wanted` [b k], a mean over images.

    The loss of one image is T^2 KL(softmax(wanted / T) || softmax(logits / T)), with the temperature T.
    """
    ours, theirs = (each.div(temperature).log_softmax(dim=1) for each in (logits, wanted))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(dim=1).mean()


@dataclass(frozen=True)
class CutMix:
    """Box (`rows` and `columns`) that CutMix replaces in every image of a batch, and images that give its content."""

    rows: slice
    columns: slice
    partners: NDArray[np.int64]
    """[b] permutation: position in the batch of the image from which each image gets its box."""


def draw_cutmix(alpha: float, batch: int, size: tuple[int, int], random: np.random.Generator) -> CutMix:
    """Draw one box for a batch of images of `size` (height, width), and a partner for each image.

    The share of an image that is kept has a Beta distribution with both parameters `alpha`. The box's centre lies
    anywhere in the image, so the border may cut the box.
    """
    kept = random.beta(alpha, alpha)
    rows, columns = (box_side(length, kept, int(random.integers(length))) for length in size)
    return CutMix(rows, columns, random.permutation(batch))


def box_side(length: int, kept: float, centre: int) -> slice:
    """Slice of the rows, or of the columns, that a box covers; cut at the image's border.

    Args:
        length: the image's height or width in pixels.
        kept: share of the image's area outside the box, in [0, 1], before the border cuts the box.
        centre: row or column in the middle of the box.
    """
    side = int(length * math.sqrt(1 - kept))
    first = centre - side // 2
    return slice(max(0, first), min(length, first + side))


def mix(images: Tensor, drawn: CutMix) -> Tensor:
    """Copy of images [b c h w] in which the box of `drawn` has the content of the same box of each image's partner."""
    mixed, box = images.clone(), (slice(None), slice(None), drawn.rows, drawn.columns)
    mixed[box] = images[box][torch.from_numpy(drawn.partners).to(images.device)]
    return mixed
