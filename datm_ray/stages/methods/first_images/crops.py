"""Crops of real images that a teacher classifies best (RDED), for method select, or as first images of method sre2l.

The section `select` of the recipe sets which crops are tried. Crops are chosen class by class, so any division of the
classes over workers gives the same crops.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datm_ray.config import RunConfig
from datm_ray.core.training.loop import in_batches
from datm_ray.data.sources import RawDataset
from datm_ray.errors import ConfigError, DatasetError
from datm_ray.methods.selection import best_crops, crop_for_tile, draw_boxes, drawn_order, keep, padded, tiled
from datm_ray.stages.methods.part import Arrays, Part, shared_arrays
from datm_ray.words import dimensions


@dataclass(frozen=True)
class Crops:
    """Chosen crops of a class, the best first: t*t crops for each of its images in the set, with t = `select.tiles`."""

    rows: NDArray[np.int64]
    """[n] index of the training image of each crop."""
    boxes: Tensor
    """Boxes [n 4] of the crops: top, left, height and width, as shares of the image's sides."""

    def images(self, part: Part, numbers: range) -> Tensor:
        """Make some of the class's images, [n c h w], tiled from the crops.

        Args:
            part: the worker's part, whose data set has the images to crop.
            numbers: numbers of the images to make, within 0 to ipc - 1.
        """
        tiles = part.config.select.tiles
        of_tiles = np.arange(tiles**2)[:, None] * part.config.distill.ipc
        chosen = (of_tiles + np.arange(numbers.start, numbers.stop)).flatten()
        return tiled(_cropped(part, self.rows[chosen], self.boxes[chosen]), tiles)


def chosen_crops(part: Part, teacher: nn.Module, label: int) -> Generator[None, None, Crops]:
    """Choose the crops with the lowest losses of a class, at most one per image. Yields between scoring steps.

    Args:
        part: the worker's part, whose section `select` says which crops are tried.
        teacher: network in evaluation mode whose cross-entropy is the score.
        label: the class.
    """
    config, size = part.config, part.dataset.size
    settings = config.select
    rows = drawn_order(np.flatnonzero(part.dataset.train_labels == label), config.seed, label)[: settings.pool]
    boxes = draw_boxes(len(rows), settings.crops, settings.least_share, config.seed, label)

    def losses(crops: NDArray[np.int64]) -> Tensor:
        places, numbers = np.divmod(crops, settings.crops)
        logits = teacher(padded(_cropped(part, rows[places], boxes[places, numbers]), *size)).double()
        return cross_entropy(logits, torch.full((len(crops),), label, device=logits.device), reduction="none")

    every = yield from in_batches(losses, np.arange(len(rows) * settings.crops))
    numbers, lowest = best_crops(every.numpy().reshape(len(rows), settings.crops))
    places = keep(lowest, crops_of_class(config))
    return Crops(rows[places], boxes[places, numbers[places]])


def shared_crops(part: Part, teacher: nn.Module, label: int) -> Generator[None, None, Crops]:
    """Choose the crops of a class as `chosen_crops` does, but once for all pieces (parts) of the set."""
    config = part.config

    def choose() -> Generator[None, None, Arrays]:
        chosen = yield from chosen_crops(part, teacher, label)
        return {"rows": chosen.rows, "boxes": chosen.boxes.numpy()}

    settings = (config.select.model_dump_json(), config.seed, config.distill.ipc)
    arrays = yield from shared_arrays(part, f"crops-{label:05d}", settings, choose)
    return Crops(arrays["rows"], torch.from_numpy(arrays["boxes"]))


def _cropped(part: Part, rows: NDArray[np.int64], boxes: Tensor) -> Tensor:
    """Crops [n c h w], as large as a tile, of the training images with indices `rows` [n], on the part's device.

    A box [4] is the crop's top, left, height and width, as shares of the image's sides. An image
    with several crops is read once, because a streamed one is decoded whenever it is read.
    """
    different, places = np.unique(rows, return_inverse=True)
    images = torch.from_numpy(part.dataset.train_images[different]).to(part.device)[places]
    return crop_for_tile(images, boxes.to(part.device), part.config.select.tiles)


def crops_of_class(config: RunConfig) -> int:
    """Number of crops per class from which the class's images in the set are made."""
    return config.distill.ipc * config.select.tiles**2


def crops_scored(config: RunConfig, classes: int, training_images: int) -> int:
    """Number of crops of all classes that the teacher scores."""
    return classes * min(config.select.pool, training_images // classes) * config.select.crops


def check_crops(config: RunConfig) -> None:
    """Raise a `ConfigError` if `select.pool`, the number of images tried per class, is too small for the set's crops.

    At most one crop of each image is used.
    """
    wanted = crops_of_class(config)
    if config.select.pool < wanted:
        raise ConfigError(
            f"select.pool is {config.select.pool}, and {wanted} crops of each class are wanted",
            "an image gives one crop at most",
            f"use --set select.pool={wanted} or more",
        )


def check_images_for_crops(config: RunConfig, images: RawDataset) -> None:
    """Raise a `DatasetError` for too few images, or images that do not divide into tiles."""
    tiles, smallest = config.select.tiles, int(np.bincount(images.train.labels, minlength=images.classes).min())
    if smallest < crops_of_class(config):
        raise DatasetError(
            f"select.tiles={tiles} needs {crops_of_class(config)} training images of each class, and a class has "
            f"{smallest}",
            remedy="lower select.tiles or distill.ipc",
        )
    if any(side % tiles for side in images.size):
        raise DatasetError(
            f"images of {dimensions(images.size)} do not divide into {tiles} tiles a side",
            remedy="use --set select.tiles=1, or another dataset.resize",
        )
