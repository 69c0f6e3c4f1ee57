"""The synthetic set: what is learned, and how it starts.

Shapes: n synthetic images, k classes, e experts, c h w image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.randomness import Purpose, generator
from datm_ray.errors import DatasetError


@dataclass
class SyntheticSet:
    """The learned variables and the classes they were made for."""

    images: Tensor
    """[n c h w], normalised as the experts' training images were."""
    soft_labels: Tensor
    """[n k] logits; a student is trained towards their softmax."""
    step_size: Tensor
    """[] the student's SGD step size."""
    labels: Tensor
    """[n] int64, the class each image was started from; not learned."""

    def clone(self) -> SyntheticSet:
        """An independent copy, detached from any graph."""
        return SyntheticSet(
            self.images.detach().clone(),
            self.soft_labels.detach().clone(),
            self.step_size.detach().clone(),
            self.labels.clone(),
        )

    def is_valid(self) -> bool:
        """Whether every value is finite and the step size is positive."""
        learned = (self.images, self.soft_labels, self.step_size)
        return all(bool(t.isfinite().all()) for t in learned) and float(self.step_size) > 0


def random_rows(labels: NDArray[np.int64], ipc: int, seed: int) -> NDArray[np.int64]:
    """Rows of `ipc` random images of each class, class by class.

    Raises:
        DatasetError: a class has fewer images than asked for.
    """
    order = _shuffled_by_class(labels, seed)
    _require_ipc(order, ipc)
    return np.concatenate([rows[:ipc] for rows in order])


def correct_rows(
    labels: NDArray[np.int64],
    ipc: int,
    seed: int,
    *,
    experts: int,
    predictions: Callable[[int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Rows of `ipc` images of each class that an expert classifies correctly, class by class.

    As published: in shuffled order, those that expert 0 gets right; if a class is short, those of expert 1, and
    so on. A class that all experts together leave short is filled with its other images.

    Args:
        labels: [n] classes of the real training images.
        experts: how many experts may be asked.
        predictions: expert -> [n] classes it predicts; called only as far as needed.

    Raises:
        DatasetError: a class has fewer images than asked for.
    """
    order = _shuffled_by_class(labels, seed)
    _require_ipc(order, ipc)
    chosen: list[list[int]] = [[] for _ in order]
    for expert in range(experts):
        right = predictions(expert) == labels
        for rows, taken in zip(order, chosen, strict=True):
            candidates = [int(row) for row in rows if right[row] and row not in taken]
            taken += candidates[: ipc - len(taken)]
        if all(len(taken) == ipc for taken in chosen):
            break
    for rows, taken in zip(order, chosen, strict=True):
        taken += [int(row) for row in rows if row not in taken][: ipc - len(taken)]
    return np.array([row for taken in chosen for row in taken], np.int64)


def mean_correct_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft labels [n k]: for each image the mean logits of those experts that classify it correctly.

    An image that no expert gets right (possible among random ones) takes the mean over all experts.

    Args:
        logits: [e n k], one set per expert.
        labels: [n] true classes.
    """
    right = logits.argmax(dim=2) == labels
    right = right | ~right.any(dim=0)
    weights = right.to(logits.dtype).unsqueeze(2)
    return (logits * weights).sum(dim=0) / weights.sum(dim=0)


def _shuffled_by_class(labels: NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    draw = generator(seed, Purpose.REAL_SAMPLES)
    return [draw.permutation(np.flatnonzero(labels == k)) for k in range(int(labels.max()) + 1)]


def _require_ipc(order: list[NDArray[np.int64]], ipc: int) -> None:
    smallest = min(range(len(order)), key=lambda k: len(order[k]))
    if ipc > len(order[smallest]):
        raise DatasetError(
            f"distill.ipc is {ipc}, but class {smallest} has only {len(order[smallest])} training images",
            remedy="lower distill.ipc",
        )
