"""Replay of stored labels: a torch data set of a synthetic set's augmented images, with a teacher's logits for each.

A view is an image as augmented in one epoch. Views do not depend on each other, so an ordinary `DataLoader` works: any
batch size, any order, any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datm_ray.artifact import Artifact
from datm_ray.core.training.labelling import Views, apply_views, require_labelled, unpack_logits
from datm_ray.store.labels import LabelRecords, LabelStore


class ReplayedLabels(Dataset[tuple[Tensor, Tensor]]):
    """Map-style data set of pairs (augmented image [c h w], teacher's logits [k]) of one epoch, one for each image.

    >>> labels = datm_ray.ReplayedLabels(datm_ray.load("synthetic.arrow"), "labels")
    >>> loader = torch.utils.data.DataLoader(labels, batch_size=128, shuffle=True)
    >>> for epoch in range(labels.info.epochs):
    ...     labels.set_epoch(epoch)
    ...     for views, logits in loader: ...

    The loader's workers share the epoch, persistent workers too. Epochs beyond the stored ones repeat them in turn:
    with n stored epochs, epoch e has the labels of epoch e mod n.
    """

    def __init__(
        self,
        images: Artifact | Tensor,
        labels: str | LabelStore,
        *,
        keep: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Open the label store, and check that it was made for these images.

        Args:
            images: the synthetic set, or its images [n c h w] on any device.
            labels: URI of the label store, or the store.
            keep: number of first epochs to use of a store that is given by its URI; `None` uses all.
            device: device of the views and logits, to which the images of a batch are copied; `None` for the images'
                device.

        Raises:
            ConfigError: the labels were made for other images.
            StoreError: there is no label store, or it has fewer epochs than `keep`.
        """
        self.images = images.images if isinstance(images, Artifact) else images
        self.device = device or self.images.device
        self.labels = LabelStore(labels, keep=keep) if isinstance(labels, str) else labels
        self.info = self.labels.info
        require_labelled(self.images, self.info.set_fingerprint, self.labels.location.uri)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def epoch(self) -> int:
        """Current epoch of the training, from 0, for which views and logits are returned."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the training, from 0; call it before the loader is iterated over.

        Raises:
            ValueError: the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epochs are numbered from 0, not {epoch}")
        self._epoch.fill_(epoch)

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Views [b c h w] and logits [b k] of the images with these indices, on `device`.

        Calling this method is faster than a loader.

        Raises:
            IndexError: the set has no such image.
            StoreError: the epoch is not labelled yet, or cannot be read.
            CorruptFileError: the epoch's file is damaged.
        """
        chosen = np.asarray(rows, np.int64)
        records = self.labels.read(self.info.pool_epoch(self.epoch), chosen)
        logits = unpack_logits(records.values, records.indices, self.info.classes)
        return apply_views(self.images, views_of(chosen, records), self.device), logits.to(self.device)

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Pairs (view [c h w], logits [k]) of the images with these indices. Loaders call this once per batch."""
        return list(zip(*self.batch(rows), strict=True))

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Pair (view [c h w], logits [k]) of the image with index `row`."""
        return self.__getitems__([row])[0]


def views_of(rows: NDArray[np.int64], records: LabelRecords) -> Views:
    """Describe the views of the images with indices `rows` by the crops, flips and mixtures in the records."""
    return Views(rows, records.boxes, records.flips, records.partners, records.lambdas, records.mix_boxes)
