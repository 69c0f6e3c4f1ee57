"""A teacher's logits for every epoch: drawing views of the images, making the views, and labelling them.

Methods that follow SRe2L train networks on views of the images: random resized crops, mirrored and mixed (CutMix). Each
view gets the logits of a trained network, the teacher. Here a view is drawn for every pair (epoch, image) from counters
alone. Drawing, making and labelling are separate, so that a training can make the labelled views again.

CutMix pastes a box of a partner image into a view. Published programs (FKD) draw one size of box, one position and one
permutation of partners for a whole batch, so a training needs the same batches as the labelling. Here every view has
its own box and its own partner among all images. Therefore batches may have any size and order. The partner has the
same crop and mirroring as the view's own image; in FKD the partner has its own crop.

Shapes: n views, m images of the set, c h w image, k classes, t classes whose logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.core.images.augment import LEAST_SHARE, crop_boxes, resized_crop
from datm_ray.core.images.batches import rows_on
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.loop import device_of, predict_logits
from datm_ray.errors import ConfigError

MIX = 1.0
"""Default of both parameters of the beta distribution from which CutMix draws the share of a view's area that keeps the
view's own image, as published."""


@dataclass(frozen=True, eq=False)
class Views:
    """Augmented views of images in one epoch: how to make each view, not its pixels."""

    rows: NDArray[np.int64]
    """[n] index, in the set, of the image that each view crops (its own image, not CutMix's partner)."""
    boxes: NDArray[np.float32]
    """[n 4] crop of each view: top, left, height and width as shares of the image's sides."""
    flips: NDArray[np.bool_]
    """[n] True for views mirrored left to right."""
    partners: NDArray[np.int32]
    """[n] index of each view's partner: the image from which CutMix pastes a box into the view."""
    lambdas: NDArray[np.float32]
    """[n] share, in [0, 1], of each view's area that shows the view's own image, not the partner."""
    mix_boxes: NDArray[np.uint16]
    """[n 4] box of the partner in the view: top, left, height and width in pixels; nothing is pasted if a side is 0."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: slice | NDArray[np.int64]) -> Views:
        """Copy with only the views at these positions in the vectors."""
        return Views(*(getattr(self, each.name)[places] for each in fields(self)))


def draw_views(
    seed: int, epoch: int, count: int, size: tuple[int, int], *, least_share: float = LEAST_SHARE, mix: float = MIX
) -> Views:
    """Draw one view of each of `count` images. The same arguments give the same views on every machine.

    Args:
        seed: seed of the labels.
        epoch: number of the epoch, from 0.
        size: height and width of the images in pixels.
        least_share: smallest share of an image's area that a crop is drawn with, in (0, 1]. A crop longer than the
            image is shortened. So even with 1, a crop may keep as little as 87 % of the area.
        mix: both parameters of a beta distribution. CutMix pastes a box of another image (the partner) into each view.
            The share of the view outside the box, before the border cuts the box, has this distribution. 0 pastes
            nothing.
    """
    random = generator(seed, Purpose.LABEL_VIEWS, epoch)
    uniform = random.random((count, 8))
    kept = random.beta(mix, mix, count) if mix else np.ones(count)
    mix_boxes = _mix_boxes(kept, uniform[:, 6:], size)
    others = np.floor(uniform[:, 5] * (count - 1)).astype(np.int64)  # any other image; itself if it is alone
    return Views(
        rows=np.arange(count),
        boxes=crop_boxes(torch.from_numpy(uniform[:, :4]), least_share).float().numpy(),
        flips=uniform[:, 4] < 0.5,
        partners=((np.arange(count) + 1 + others) % count).astype(np.int32),
        lambdas=(1 - mix_boxes[:, 2:].astype(np.float64).prod(axis=1) / math.prod(size)).astype(np.float32),
        mix_boxes=mix_boxes,
    )


def _mix_boxes(kept: NDArray[np.float64], centre: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint16]:
    """Make CutMix's boxes [n 4] in pixels, with the image's ratio of sides.

    The image's border may cut a box. So a view may keep a larger share than `kept`.

    Args:
        kept: [n] share of each view's area outside an uncut box, in [0, 1].
        centre: [n 2] centre of each box, as fractions of height and width.
        size: height and width of the images in pixels.
    """
    sides = np.array(size)
    half = (sides * np.sqrt(1 - kept)[:, None]).astype(np.int64) // 2
    middle = (centre * sides).astype(np.int64)
    first, last = (middle - half).clip(0, sides), (middle + half).clip(0, sides)
    return np.concatenate([first, last - first], axis=1).astype(np.uint16)


def apply_views(images: Tensor, views: Views, device: torch.device | None = None) -> Tensor:
    """Make the views [n c h w] of a set's images [m c h w].

    Args:
        images: [m c h w] images, which `views` indexes.
        device: device of the views, to which only the images of the views are copied; `None` for the images' device.
    """
    device = device or images.device
    boxes, flips = (torch.from_numpy(each).to(device) for each in (views.boxes, views.flips))
    shown = _cropped(images, views.rows, boxes, flips)
    mixed = np.flatnonzero(views.mix_boxes[:, 2:].all(axis=1))
    if len(mixed):
        places = torch.from_numpy(mixed).to(device)
        pasted = _cropped(images, views.partners[mixed], boxes[places], flips[places])
        inside = _inside(views.mix_boxes[mixed], shown)
        shown[places] = torch.where(inside, pasted, shown[places])
    return shown


def _cropped(images: Tensor, rows: NDArray[Any], boxes: Tensor, flips: Tensor) -> Tensor:
    chosen = rows_on(images, torch.from_numpy(rows.astype(np.int64)), boxes.device)
    crops = resized_crop(chosen, boxes)
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(3), crops)


def _inside(mix_boxes: NDArray[np.uint16], images: Tensor) -> Tensor:
    """Make a mask for each box: True for the pixels of an image that lie in the box. Returns all masks [n 1 h w].

    Args:
        mix_boxes: top, left, height and width of each box [n 4], in pixels.
        images: any images [.. h w], which give the masks' size and device; their pixels are not read.
    """
    top, left, height, width = torch.from_numpy(mix_boxes.astype(np.int64)).to(images.device)[:, :, None].unbind(1)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    vertical, horizontal = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (vertical[:, :, None] & horizontal[:, None, :])[:, None]


def teacher_logits(network: nn.Module, images: Tensor, views: Views, batch: int) -> Tensor:
    """Compute a network's logits [n k], in evaluation mode, for views of a set's images [m c h w].

    The views are made on the network's device.

    Args:
        batch: number of views to make and label at a time.
    """
    parts = (views.take(slice(first, first + batch)) for first in range(0, len(views), batch))
    made = (apply_views(images, part, device_of(network)) for part in parts)
    return torch.cat([predict_logits(network, each, batch_size=batch) for each in made])


def pack_logits(
    logits: Tensor, top: int | None, temperature: float = 1.0
) -> tuple[NDArray[np.float16], NDArray[np.uint16]]:
    """Pack logits [n k] for storage: their values and, if only the largest are kept, their classes.

    With `top`, the values are the t largest logits in descending order, and one common logit for all other classes. The
    common logit spreads the other classes' probability evenly over them. So every kept class has its exact probability
    at the given temperature, up to rounding to float16. At other temperatures the probabilities differ.

    Args:
        logits: [n k], on any device.
        top: number t of logits to keep, from 1 to k - 1; `None` keeps all logits.
        temperature: divisor of the logits in the softmax for which the kept probabilities are exact.

    Returns:
        Values [n k] and classes [n 0]; with `top` values [n t+1] and classes [n t].

    Raises:
        ValueError: `top` is not from 1 to k - 1, or there are more than 65,536 classes to keep some of.
    """
    logits = logits.float()
    if top is None:
        return _halves(logits), np.zeros((len(logits), 0), np.uint16)
    classes = logits.shape[1]
    if not 1 <= top < classes <= 2**16:
        raise ValueError(f"the {top} largest of {classes} logits cannot be kept")
    largest, indices = logits.topk(top)
    others = logits.scatter(1, indices, -math.inf) / temperature
    level = temperature * (others.logsumexp(dim=1, keepdim=True) - math.log(classes - top))
    return _halves(torch.cat([largest, level], dim=1)), indices.cpu().numpy().astype(np.uint16)


def unpack_logits(values: NDArray[np.float16], indices: NDArray[np.uint16], classes: int) -> Tensor:
    """Restore logits [n k], as float32 on the CPU, from what `pack_logits` returned. `classes` is k."""
    kept = torch.from_numpy(values.astype(np.float32))
    if indices.shape[1] == 0:
        return kept
    logits = kept[:, -1:].repeat(1, classes)
    return logits.scatter_(1, torch.from_numpy(indices.astype(np.int64)), kept[:, :-1])


class DrawnLabels:
    """Views of images, and a teacher's logits for the views. Both are computed when needed, and not stored.

    Controls, such as random real images, are scored with these labels, and distilled sets with stored labels. Both
    kinds of labels are made in the same way, so that only the images differ. The logits equal stored logits up to
    rounding, because the teacher reads the views in other batches.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        seed: int,
        keep: int,
        *,
        top: int | None = None,
        temperature: float = 1.0,
        views: Mapping[str, float],
        at_once: int | None = None,
    ) -> None:
        """Draw the views of epoch 0.

        Args:
            network: teacher, on the device of the training; it is used in evaluation mode.
            images: [m c h w] the images, on the same device or in main memory.
            seed: seed of the views.
            keep: number of epochs whose views and labels a training repeats in turn.
            top: number of largest logits to keep; `None` keeps all.
            temperature: divisor of the logits in the softmax for which kept probabilities are exact; not read if
                `top` is `None`.
            views: arguments of `draw_views` by name: `least_share`, `mix`, both or none.
            at_once: largest number of views that the teacher labels at a time; `None` for all views of a batch.
        """
        self._at_once = at_once
        self._network, self._images, self._seed, self._keep = network, images, seed, keep
        self._top, self._temperature, self._settings = top, temperature, dict(views)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of an epoch of the training, from 0. The same views come again every `keep` epochs."""
        size = (self._images.shape[2], self._images.shape[3])
        self._views = draw_views(self._seed, epoch % self._keep, len(self._images), size, **self._settings)

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Make views [b c h w] of the images at these indices, and logits [b k] of the views.

        The views are those of the epoch that `set_epoch` was last called with.
        """
        views = self._views.take(np.asarray(rows, np.int64))
        made = apply_views(self._images, views, device_of(self._network))
        logits = predict_logits(self._network, made, batch_size=self._at_once or len(made))
        return made, _as_stored(logits, self._top, self._temperature)


def _as_stored(logits: Tensor, top: int | None, temperature: float) -> Tensor:
    """Logits [n k] as `unpack_logits` would restore them from `pack_logits`, on their own device."""
    if top is None:
        return logits.half().float()  # on the device, so that the CPU does not wait for a GPU
    return unpack_logits(*pack_logits(logits, top, temperature), logits.shape[1]).to(logits.device)


def _halves(values: Tensor) -> NDArray[np.float16]:
    halves: NDArray[np.float16] = values.half().cpu().numpy()
    return halves


def images_fingerprint(images: Tensor) -> str:
    """Digest (16 hex digits) of the values and shape of images [m c h w]. Labels store it to recognise their images."""
    values = images.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False)
    digest = sha256(repr(tuple(values.shape)).encode())
    digest.update(values.data)
    return digest.hexdigest()[:16]


def require_labelled(images: Tensor, fingerprint: str, place: str) -> None:
    """Raise a `ConfigError` unless labels were made for these images, so that their `images_fingerprint` is the same.

    `fingerprint` is stored with the labels. `place` is the labels' folder, for the message.
    """
    found = images_fingerprint(images)
    if found != fingerprint:
        raise ConfigError(
            f"{place} has labels of images with fingerprint {fingerprint}, but the {len(images)} given have {found}",
            "the set was distilled again or converted since its labels were started",
            "give the labelled images, as `datm_ray.load` reads them, or remove these labels and make new ones",
        )
