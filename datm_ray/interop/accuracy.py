"""Accuracy of an imported network on test images; if low, its normalisation or order of classes may be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from datm_ray.core.training.loop import predict_logits
from datm_ray.data.sources import RawDataset
from datm_ray.data.transform import Transform
from datm_ray.errors import CorruptFileError

MEASURED_IMAGES = 1000
"""Largest number of test images on which an imported network is measured."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a network on some test images."""

    share: float
    """Share of the measured test images that are classified correctly, in [0, 1]; their number is `images`."""
    images: int
    classes: int

    @property
    def is_guessing(self) -> bool:
        """True if the accuracy is at most two standard deviations above that of random guessing, 1 / `classes`."""
        chance = 1 / self.classes
        return self.share <= chance + 2 * math.sqrt(chance * (1 - chance) / self.images)


def accuracy_of(network: nn.Module, raw: RawDataset, transform: Transform, uri: str) -> Accuracy:
    """Accuracy of a network on evenly spaced test images, at most `MEASURED_IMAGES`.

    Args:
        network: the imported network.
        raw: data set with the test images.
        transform: normalisation that the network's images need.
        uri: file that the network was imported from, for the error's message.

    Raises:
        CorruptFileError: a logit is not finite.
    """
    rows = np.linspace(0, len(raw.test) - 1, min(len(raw.test), MEASURED_IMAGES)).astype(np.int64)
    images = transform.normalise(raw.test.images[rows].astype(np.float32) / np.float32(raw.levels))
    logits = predict_logits(network, images)
    if not logits.isfinite().all():
        raise CorruptFileError(
            f"the network of {uri} gives logits that are not finite",
            "its values are so large that float32 overflows, or its statistics belong to another network",
            "import a file of an earlier epoch, or train the network again",
        )
    labels = torch.from_numpy(raw.test.labels[rows])
    return Accuracy(float((logits.argmax(dim=1) == labels).float().mean()), len(rows), raw.classes)
