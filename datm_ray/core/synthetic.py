"""The synthetic set: its learned variables, and functions that choose its first images and labels.

Images are ordered by class, so the images of neighbouring classes (a class shard) have consecutive indices. Shapes: n
images, k classes, a backbones, c h w image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.steps import Steps

AllSum = Callable[[Tensor], Tensor]
"""Function that adds a tensor over all workers that share a computation, such as the class shards (workers with some of
the classes). Every worker gets the sum."""


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the `AllSum` of a process that shares its computation with no other."""
    return tensor


@dataclass(frozen=True, order=True)
class Rows:
    """Part of a synthetic set that one worker holds: the images from `first` up to, but not including, `last`.

    The images of the set are sorted by class.
    """

    first: int
    last: int

    @classmethod
    def of_shard(cls, shard: int, shards: int, classes: int, ipc: int) -> Rows:
        """Images of class shard number `shard`, from 0, in a set with `ipc` images per class.

        The classes 0 to `classes` - 1 are divided among `shards` shards in order. If they cannot be divided equally,
        the first shards have one class more.
        """
        bounds = [part[0] for part in np.array_split(np.arange(classes), shards)] + [classes]
        return cls(int(bounds[shard]) * ipc, int(bounds[shard + 1]) * ipc)

    def classes(self, ipc: int) -> range:
        """Classes of the images that `Rows` covers, in a set with `ipc` images per class."""
        return range(self.first // ipc, self.last // ipc)


@dataclass
class SyntheticSet:
    """Synthetic set: the learned variables and the images' classes."""

    images: Tensor
    """[n c h w] images, normalised like the experts' training images."""
    soft_labels: Tensor
    """[n k] soft labels of the images as logits; a student is trained towards their softmax."""
    step_sizes: Tensor
    """[a] step size of SGD for each backbone. Trajectory methods learn one for each network whose experts are matched;
    other methods hold a given one."""
    labels: Tensor
    """[n] int64 class of each image; not learned."""
    latents: Tensor | None = None
    """[n ...] latents from which a prior makes the images. They are learned instead of pixels; `None` without a
    prior."""

    @property
    def step_size(self) -> Tensor:
        """[] step size of the first backbone, also used to train networks of other architectures than the backbones."""
        return self.step_sizes[0]

    def variable(self, name: str) -> Tensor:
        """Learned variable "images", "soft_labels" or "step_sizes".

        The variable "images" is the latents if the set has a prior, otherwise the pixels.
        """
        learned: Tensor = self.latents if name == "images" and self.latents is not None else getattr(self, name)
        return learned

    def each(self, function: Callable[[Tensor], Tensor]) -> SyntheticSet:
        """Copy of this set in which every tensor is replaced by `function` of this tensor."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: function(part) for name, part in parts.items() if part is not None})

    def clone(self) -> SyntheticSet:
        """Copy the set, with its own memory and detached from any graph."""
        return self.each(lambda part: part.detach().clone())

    def is_invalid(self) -> Tensor:
        """Bool tensor []: True if a learned value is not finite or a step size is not positive."""
        learned = [self.images, self.soft_labels, self.step_sizes, *([] if self.latents is None else [self.latents])]
        return torch.stack([*(~t.isfinite().all() for t in learned), (self.step_sizes <= 0).any()]).any()


def random_rows(labels: NDArray[np.int64], ipc: int, seed: int) -> NDArray[np.int64]:
    """Draw `ipc` real images of each class, without repetition. Returns their indices in the order of the classes.

    `labels` are the classes [n] of the real training images, at least `ipc` of each class.
    """
    return np.concatenate([rows[:ipc] for rows in _shuffled_by_class(labels, seed)])


def draw_rows(rows: NDArray[np.int64], count: int, seed: int, iteration: int, label: int) -> NDArray[np.int64]:
    """Draw `count` of the indices `rows`, without repetition; all of them, in random order, if there are fewer.

    Args:
        rows: indices of the images of the class `label`.
        seed, iteration, label: seed of the run, number of the iteration from 0, and class; they decide the draw.
    """
    return generator(seed, Purpose.REAL_BATCH, iteration, label).permutation(rows)[:count]


def correct_rows_in_steps(
    labels: NDArray[np.int64],
    ipc: int,
    seed: int,
    *,
    experts: int,
    predict: Callable[[int, NDArray[np.int64]], Steps[NDArray[np.int64]]],
    classes: range,
) -> Steps[NDArray[np.int64]]:
    """Choose `ipc` real images of each class that experts classify correctly. Returns indices in the order of classes.

    Images are taken in shuffled order, as published, first those that expert 0 classifies correctly. A class with too
    few of them gets images that expert 1 classifies correctly, and so on. A class with too few after all experts is
    filled with its other images.

    Args:
        labels: [n] classes of the real training images, at least `ipc` of each class.
        experts: number of experts to use at most.
        predict: function (expert, indices) -> `Steps` generator that returns the classes which the expert predicts for
            these images. It is called for at most 2 `ipc` images of a class at a time, until the class has enough.
        classes: classes to choose images for.
    """
    shuffled = _shuffled_by_class(labels, seed)
    order = [shuffled[k] for k in classes]
    chosen: list[list[int]] = [[] for _ in order]
    for expert in range(experts):
        asked = 0
        # Predict 2 * ipc images of each class at a time. Most are classified correctly, so that a large data set need
        # not be predicted as a whole.
        while any(len(taken) < ipc and asked < len(rows) for rows, taken in zip(order, chosen, strict=True)):
            block = [
                [int(row) for row in rows[asked : asked + 2 * ipc] if row not in taken] if len(taken) < ipc else []
                for rows, taken in zip(order, chosen, strict=True)
            ]
            candidates = np.array([row for asked_for in block for row in asked_for], np.int64)
            predicted = yield from predict(expert, candidates)
            right = set(candidates[predicted == labels[candidates]].tolist())
            for asked_for, taken in zip(block, chosen, strict=True):
                taken += [row for row in asked_for if row in right][: ipc - len(taken)]
            asked += 2 * ipc
        if all(len(taken) == ipc for taken in chosen):
            break
    for rows, taken in zip(order, chosen, strict=True):
        taken += [int(row) for row in rows if row not in taken][: ipc - len(taken)]
    return np.array([row for taken in chosen for row in taken], np.int64)


def hard_logits(labels: Tensor, classes: int) -> Tensor:
    """Turn hard labels [n] into logits [n k]: 20 for the label, 0 for all others, whose softmax is then 2e-9 each."""
    return 20.0 * torch.nn.functional.one_hot(labels, classes).to(torch.float32)


def mean_correct_in_steps(logits: Iterable[Steps[Tensor]], labels: Tensor) -> Steps[Tensor]:
    """Compute soft labels [n k] as logits: for each image, the mean logits of the experts that classify it correctly.

    An image that no expert classifies correctly, as a randomly chosen one may be, gets the mean over all experts.

    Args:
        logits: for each expert, a `Steps` generator that computes the expert's logits [n k].
        labels: [n] true classes.
    """
    zero = torch.zeros((), device=labels.device)
    right_sum = right_count = total = count = zero
    for steps in logits:
        of_expert = yield from steps
        right = (of_expert.argmax(dim=1) == labels).to(of_expert.dtype).unsqueeze(1)
        right_sum, right_count = right_sum + of_expert * right, right_count + right
        total, count = total + of_expert, count + 1
    return torch.where(right_count > 0, right_sum / right_count, total / count)


def _shuffled_by_class(labels: NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    draw = generator(seed, Purpose.REAL_SAMPLES)
    return [draw.permutation(np.flatnonzero(labels == k)) for k in range(int(labels.max()) + 1)]
