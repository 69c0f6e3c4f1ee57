"""Scores by which the method `select` chooses real images for a synthetic set, without optimisation.

    RDED (arXiv 2312.03526)          a teacher's cross-entropy for random crops; one crop per image, the lowest first
    moderate (Xia et al., 2023)      distance of an image's features to the class centre; nearest to the median first
    EL2N (Paul et al., 2021)         norm of softmax minus one-hot, mean over networks; the lowest or the highest first
    forgetting (Toneva et al., 2019) times that a network forgets an image, mean over networks; lowest or highest first

Images are chosen class by class, so any division of the classes over workers gives the same set. A class's images are
first put into a random order, which decides between equal scores. No code here runs a network.

Shapes: n real images of a class, m crops of each, k classes, d features, c h w an image, e epochs, t tiles in each
direction. Tests: tests/methods/test_selection.py.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, one_hot, pad

from datm_ray.core.images.augment import crop_boxes, resized_crop
from datm_ray.core.randomness import Purpose, generator

Scores = NDArray[np.float64]
Work = Generator[None, None, dict[int, Scores]]
"""Type of a generator that scores images step by step, yields `None` after steps, and returns class -> scores [n]."""


def drawn_order(rows: NDArray[np.int64], seed: int, label: int) -> NDArray[np.int64]:
    """Shuffle `rows`, the indices of a class's images in the data set. The order depends on seed and class alone."""
    return generator(seed, Purpose.SELECTION_ORDER, label).permutation(rows)


def keep(scores: Scores, count: int, *, hardest: bool = False) -> NDArray[np.int64]:
    """Indices of the `count` lowest of the scores [n], lowest first; with `hardest`, of the highest, highest first.

    Equal scores keep their order, and scores that are not finite come last.
    """
    signed = -scores if hardest else scores
    order = np.argsort(np.where(np.isfinite(signed), signed, np.inf), kind="stable")
    return order[:count]


def moderate_scores(features: NDArray[np.floating]) -> Scores:
    """Score [n] of "moderate": how far an image's distance to the class centre is from the class's median distance.

    Scores are absolute differences, at least 0. The centre is the median of every feature over the class's images, as
    in the authors' program.

    Args:
        features: [n d] features of the images of one class.
    """
    exact = features.astype(np.float64)
    distances = np.linalg.norm(exact - np.median(exact, axis=0), axis=1)
    scores: Scores = np.abs(distances - np.median(distances))
    return scores


def el2n_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Score [n] of EL2N: norm of the difference of softmax and one-hot class, between 0 and the root of 2.

    Args:
        logits: [n k] logits of one network for the images.
        labels: [n] numbers of the images' classes.
    """
    error = logits.double().softmax(dim=1) - one_hot(labels, logits.shape[1])
    scores: Scores = error.norm(dim=1).cpu().numpy()
    return scores


def forgetting_scores(correct: NDArray[np.bool_]) -> Scores:
    """Score [n] of "forgetting": how often an image is classified correctly after one epoch and wrongly after the next.

    An image that is never classified correctly scores e, the number of epochs. This is more than any other image, as in
    the paper.

    Args:
        correct: [e n] True where one network classifies the image correctly after the epoch.
    """
    forgotten: NDArray[np.bool_] = correct[:-1] & ~correct[1:]
    return np.where(correct.any(axis=0), forgotten.sum(axis=0), len(correct)).astype(np.float64)


def draw_boxes(count: int, crops: int, least_share: float, seed: int, label: int) -> Tensor:
    """Draw boxes [n m 4] of random crops, for the n = `count` images of a class in their drawn order.

    A box is top, left, height and width, as shares of the image's sides. Each image has m = `crops` crops. A crop takes
    at least `least_share` of the image's area, and keeps the image's ratio of width to height.
    """
    uniform = generator(seed, Purpose.SELECTION_CROPS, label).random((count * crops, 4))
    return crop_boxes(torch.from_numpy(uniform), least_share, largest_ratio=1.0).view(count, crops, 4)


def crop_for_tile(images: Tensor, boxes: Tensor, tiles: int) -> Tensor:
    """Crop each image [b c h w] by its box [b 4], and resize the crop to a tile [b c h/t w/t], where t is `tiles`.

    A box is top, left, height and width, as shares of the image's sides.
    """
    crops = resized_crop(images, boxes)
    if tiles == 1:
        return crops
    size = [side // tiles for side in images.shape[2:]]
    return interpolate(crops, size, mode="bilinear", align_corners=False, antialias=True)


def padded(crops: Tensor, height: int, width: int) -> Tensor:
    """Pad crops [b c ..] evenly with zeros, the mean colour, to images [b c height width] for the teacher."""
    free = [side - own for side, own in zip((height, width), crops.shape[2:], strict=True)]
    top, left = free[0] // 2, free[1] // 2
    return pad(crops, (left, free[1] - left, top, free[0] - top))


def best_crops(losses: Scores) -> tuple[NDArray[np.int64], Scores]:
    """Index [n] of each image's crop with the lowest loss, and this loss [n]. Of equal losses, the first counts.

    Args:
        losses: losses [n m] of the crops. A loss that is not finite counts as infinite.
    """
    finite = np.where(np.isfinite(losses), losses, np.inf)
    return finite.argmin(axis=1), finite.min(axis=1)


def tiled(crops: Tensor, tiles: int) -> Tensor:
    """Arrange crops [n*t*t c h/t w/t] as n images [n c h w], each a grid of t rows with t crops, where t is `tiles`.

    The first n crops become the upper left tiles, the next n the tiles beside them. So if crops come best first, every
    image gets good and less good crops.
    """
    count = len(crops) // tiles**2
    places = crops.view(tiles, tiles, count, *crops.shape[1:])
    rows = [torch.cat(list(row), dim=3) for row in places]
    return torch.cat(rows, dim=2)
