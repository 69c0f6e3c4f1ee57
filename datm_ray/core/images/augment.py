"""Differentiable siamese augmentation (DSA) with the published values, driven by explicit parameters.

An `Augmentation` is an image operation, such as "crop", and its parameters for every sample of a batch. Drawing and
applying are separate. So an augmentation can be drawn for a global batch and applied to one shard's slice, and applied
again in the reverse sweep without a saved graph. One operation of the strategy is drawn per batch, and its parameters
per sample, as published. An operation may join several that are applied in turn, such as "resized+flip". Pixels are
normalised, so they are not clamped. Shapes: b samples, c h w image, p parameters of an operation for one sample.

Reference: VICO-UoE/DatasetCondensation `ParamDiffAug`, used unchanged by MTT, FTD, TESLA and DATM.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.compute.gpu import sent
from datm_ray.core.images.resampling import resampled
from datm_ray.errors import ConfigError

CROP_RATIO = 0.125
"""Largest shift of the operation `crop` in either direction, as a share of the image's side."""
CUTOUT_RATIO = 0.5
"""Side of the square that the operation `cutout` sets to zero, as a share of the image's side."""
SCALE_RATIO = 1.2
"""Largest factor by which the operation `scale` stretches or shrinks an image. Height and width get one factor each."""
ROTATE_DEGREES = 15.0
"""Largest angle of `rotate` in degrees, in either direction."""
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
"""Ranges of the operation `color`: it adds a number in [-`BRIGHTNESS`/2, `BRIGHTNESS`/2) to normalised pixels, and
multiplies saturation by a factor in [0, `SATURATION`) and contrast by one in [`CONTRAST`, 1 + `CONTRAST`)."""

NO_AUGMENTATION = ""
"""Name of the augmentation operation that changes nothing."""


@dataclass(frozen=True)
class Augmentation:
    """One augmentation operation with its parameters for each sample of a batch."""

    operation: str
    """Name of the operation, or several names joined by "+", applied one after another; "" for no operation."""
    parameters: NDArray[np.float32]
    """[b p] numbers in [0, 1), p = `width(operation)` for each sample. Their meaning depends on the operation."""

    def take(self, rows: NDArray[np.int64]) -> Augmentation:
        """Copy with only the samples at these indices of the batch, in this order."""
        return Augmentation(self.operation, self.parameters[rows])


def draw_augmentation(strategy: str, batch: int, generator: np.random.Generator) -> Augmentation:
    """Draw one operation of a strategy such as "crop_flip", with parameters for `batch` samples; "" draws none.

    An operation that does not exist raises a `ConfigError`.
    """
    operations = parse_strategy(strategy)
    if not operations:
        return Augmentation(NO_AUGMENTATION, np.zeros((batch, width(NO_AUGMENTATION)), np.float32))
    operation = operations[int(generator.integers(len(operations)))]
    return Augmentation(operation, generator.random((batch, width(operation)), np.float32))


@functools.cache
def width(operation: str) -> int:
    """Number p of an augmentation operation's parameters for one sample: 3 for "" or "flip", 7 for "flip+resized"."""
    return sum(_WIDTHS.get(part, USUAL_WIDTH) for part in operation.split("+"))


@functools.cache
def parse_strategy(strategy: str) -> tuple[str, ...]:
    """Split a strategy such as "crop+flip_color" into its operations ("crop+flip", "color"); "" gives an empty tuple.

    Raises:
        ConfigError: the strategy names an operation that does not exist.
    """
    operations = tuple(filter(None, strategy.split("_")))
    for name in (part for operation in operations for part in operation.split("+")):
        if name not in _OPERATIONS:
            raise ConfigError(
                f"augmentation {strategy!r} names {name!r}, which is not an operation",
                remedy=f"join any of {', '.join(_OPERATIONS)} with _ to draw one for each batch, or with + to apply "
                "one after another, or use '' for none",
            )
    return operations


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Apply the augmentation to images [b c h w]; differentiable in the images."""
    if augmentation.operation == NO_AUGMENTATION:
        return images
    uniform = sent(torch.from_numpy(augmentation.parameters).to(images.dtype), images.device)
    return apply_operation(images, augmentation.operation, uniform)


def apply_operation(images: Tensor, operation: str, uniform: Tensor) -> Tensor:
    """Apply an operation to images [b c h w]; differentiable in the images.

    Args:
        operation: name of an operation, or several names joined by "+", applied in turn; "" changes nothing.
        uniform: [b p] numbers in [0, 1) on the images' device: p parameters for each image, p = `width(operation)`.
    """
    if operation == NO_AUGMENTATION:
        return images
    parts = operation.split("+")
    for part, own in zip(parts, uniform.split([width(part) for part in parts], dim=1), strict=True):
        images = _OPERATIONS[part](images, own)
    return images


def augment_batches(batches: Sequence[Tensor], augmentations: Sequence[Augmentation]) -> list[Tensor]:
    """Apply to each batch [b c h w] its own augmentation, in one call for all batches with the same operation.

    The result equals that of `augment` for each batch, because no operation mixes samples. b may differ by batch.
    """
    done = list(batches)
    for operation in dict.fromkeys(each.operation for each in augmentations):
        chosen = [number for number, each in enumerate(augmentations) if each.operation == operation]
        parameters = np.concatenate([augmentations[number].parameters for number in chosen])
        augmented = augment(torch.cat([batches[number] for number in chosen]), Augmentation(operation, parameters))
        for number, batch in zip(chosen, augmented.split([len(batches[number]) for number in chosen]), strict=True):
            done[number] = batch
    return done


def augment_each(images: Tensor, augmentations: Sequence[Augmentation]) -> Tensor:
    """Apply to each of the images [b c h w] an augmentation of its own; differentiable in the images.

    Args:
        augmentations: [b] one for each image, with parameters for one sample.
    """
    return torch.cat(augment_batches(images.split(1), augmentations))


def _color(images: Tensor, uniform: Tensor) -> Tensor:
    """Change brightness, then saturation around the mean over channels, then contrast around the image's mean."""
    brightness, saturation, contrast = uniform[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5) * BRIGHTNESS
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (saturation * SATURATION) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + CONTRAST) + mean


def _crop(images: Tensor, uniform: Tensor) -> Tensor:
    """Shift each image along both axes by random whole pixels, at most `CROP_RATIO` of the side; zeros fill the gap."""
    for axis, column in ((2, 0), (3, 1)):
        side = images.shape[axis]
        reach = int(side * CROP_RATIO + 0.5)
        shift = (uniform[:, column] * (2 * reach + 1)).long() - reach
        images = _shift(images, shift, axis)
    return images


def _shift(images: Tensor, shift: Tensor, axis: int) -> Tensor:
    # `gather` instead of indexing keeps the backward pass reproducible on a GPU. That pass adds a source pixel's
    # gradients in no fixed order, but at most one of these gradients is not zero.
    side = images.shape[axis]
    source = torch.arange(side, device=images.device) + shift[:, None]
    inside = (source >= 0) & (source < side)
    shape = [images.shape[0], 1, 1, 1]
    shape[axis] = side
    index = source.clamp(0, side - 1).view(shape).expand_as(images)
    return images.gather(axis, index) * inside.view(shape).to(images.dtype)


def _cutout(images: Tensor, uniform: Tensor) -> Tensor:
    """Set a square of each image to zero. The square's centre lies anywhere in the image, so the border may cut it."""
    keep = torch.ones((), dtype=torch.bool, device=images.device)
    for axis, column in ((2, 0), (3, 1)):
        side = images.shape[axis]
        cut = int(side * CUTOUT_RATIO + 0.5)
        first = (uniform[:, column] * (side + 1 - cut % 2)).long() - cut // 2
        position = torch.arange(side, device=images.device)
        blank = (position >= first[:, None]) & (position < first[:, None] + cut)
        keep = keep & blank.view([-1, 1, side, 1] if axis == 2 else [-1, 1, 1, side])
    return images * (~keep).to(images.dtype)


def _flip(images: Tensor, uniform: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    return torch.where((uniform[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def _scale(images: Tensor, uniform: Tensor) -> Tensor:
    """Stretch or shrink height and width of each image around its centre, by two independent random factors."""
    factors = uniform[:, :2] * (SCALE_RATIO - 1 / SCALE_RATIO) + 1 / SCALE_RATIO
    zero = torch.zeros_like(factors[:, 0])
    matrix = _matrix([[factors[:, 0], zero, zero], [zero, factors[:, 1], zero]])
    return resampled(images, matrix, align_corners=True, is_turned=False)


def _rotate(images: Tensor, uniform: Tensor) -> Tensor:
    """Rotate each image around its centre by a random angle of at most `ROTATE_DEGREES` in either direction."""
    angle = (uniform[:, 0] - 0.5) * 2 * math.radians(ROTATE_DEGREES)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return resampled(images, _matrix([[cos, -sin, zero], [sin, cos, zero]]), align_corners=True, is_turned=True)


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """Stack two rows of three tensors [b] into one matrix per sample, [b 2 3]."""
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


LEAST_SHARE = 0.08
"""Default of the smallest share of an image's area that a resized crop keeps, as published."""
LARGEST_RATIO = 4 / 3
"""Default of the largest ratio of a resized crop's longer to its shorter side, as shares of the image's sides."""


def crop_boxes(uniform: Tensor, least_share: float = LEAST_SHARE, largest_ratio: float = LARGEST_RATIO) -> Tensor:
    """Make boxes [b 4] of random resized crops: top, left, height, width as shares of the image's sides, in [0, 1].

    The area and the logarithm of the ratio are uniform, as in torchvision's `RandomResizedCrop`. A box longer than the
    image is shortened to the image's side. torchvision draws another box instead, and so does `fitting_box`.

    Args:
        uniform: [b 4] numbers in [0, 1) for area, ratio, top and left.
        least_share: smallest share of the image's area that a box covers, in (0, 1], before it is shortened.
        largest_ratio: largest ratio of width to height and of height to width, as shares of the image's sides, at
            least 1; 1 keeps the image's ratio.
    """
    height, width = (side.clamp(max=1) for side in _drawn_sides(uniform, least_share, largest_ratio))
    return torch.stack([uniform[:, 2] * (1 - height), uniform[:, 3] * (1 - width), height, width], dim=1)


def _drawn_sides(uniform: Tensor, least_share: float, largest_ratio: float) -> tuple[Tensor, Tensor]:
    """Heights [b] and widths [b] of crop boxes, as shares of the image's sides, before long ones are shortened to 1.

    Only the first two columns of `uniform` [b ..] are read, for area and ratio. Other arguments: as in `crop_boxes`.
    """
    area = least_share + (1 - least_share) * uniform[:, 0]
    ratio = torch.exp((2 * uniform[:, 1] - 1) * math.log(largest_ratio))
    return (area / ratio).sqrt(), (area * ratio).sqrt()


WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])
"""Box of the whole image: top, left, height and width as shares of the image's sides."""


def fitting_box(uniform: Tensor, least_share: float) -> Tensor:
    """Choose the first of t drawn boxes that fits into the image. Returns its top, left, height and width [4].

    The four numbers are shares of the image's sides. If no box fits, the result is the whole image; if `least_share` is
    near 1, almost none fits. torchvision's `RandomResizedCrop` draws t = 10 boxes.

    Args:
        uniform: [t 4] numbers in [0, 1) for area, ratio, top and left of each box.
        least_share: smallest share of the image's area that a box covers, in (0, 1].
    """
    height, width = _drawn_sides(uniform, least_share, LARGEST_RATIO)
    fitting = ((height <= 1) & (width <= 1)).nonzero()[:, 0]
    return crop_boxes(uniform[fitting[:1]], least_share)[0] if len(fitting) else WHOLE.to(uniform)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Enlarge a box of each image [b c h w] to the image's size, bilinearly; differentiable in the images.

    Args:
        boxes: [b 4] top, left, height and width of each box, as shares of the image's sides.
    """
    top, left, height, width = boxes.to(images.dtype).unbind(1)
    zero = torch.zeros_like(top)
    rows = [[width, zero, 2 * left + width - 1], [zero, height, 2 * top + height - 1]]
    return resampled(images, _matrix(rows), align_corners=False, is_turned=False)


def _resized(images: Tensor, uniform: Tensor) -> Tensor:
    """Enlarge a random box of each image, from `crop_boxes`, to the image's size."""
    return resized_crop(images, crop_boxes(uniform))


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
    "resized": _resized,
}
USUAL_WIDTH, _WIDTHS = 3, {"resized": 4}
"""USUAL_WIDTH: number of parameters of an augmentation operation for one sample. _WIDTHS: name of an operation with
another number of parameters -> this number."""
