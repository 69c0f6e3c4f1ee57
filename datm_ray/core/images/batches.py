"""Minibatches of networks in training: order, augmentation, and the copy to the device.

Each network has its own order of images and its own augmentation. Both depend only on the network's seed, the epoch and
the number of the batch. Images are gathered and augmented for many steps at a time. Shapes: s networks, b images of a
batch, c h w image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.images.augment import Augmentation, augment_batches, draw_augmentation
from datm_ray.core.randomness import Purpose, generator

BLOCK_BYTES = 2**24
"""Largest size in bytes of images that are augmented in one call for several steps; one step may be larger."""


class ImageReader(Protocol):
    """Images that are read from their files when they are indexed, such as `datm_ray.data.streamed.StreamedImages`."""

    @property
    def shape(self) -> Sequence[int]:
        """Number of images, channels, height, width."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64] | slice, /) -> NDArray[np.float32]:
        """Read the m images at these indices, as [m c h w]."""


Images = Tensor | ImageReader
"""Normalised images [n c h w]: a tensor, or a reader that loads images when they are indexed."""


class Batch(NamedTuple):
    """One minibatch of each of s networks, for one training step."""

    epoch: int
    """Number of the epoch, from 0."""
    is_last: bool
    """True for the last step of the epoch."""
    images: Tensor
    """[s b c h w] augmented images of s networks."""
    targets: Tensor
    """[s b] int64 classes, or [s b k] floating-point numbers: probabilities, or a teacher's logits."""


def batches(
    images: Sequence[Images],
    targets: Sequence[Tensor],
    seeds: Sequence[int],
    epochs: range,
    batch_size: int,
    augmentation: str,
    seen: Callable[[int], NDArray[np.int64]] | None = None,
) -> Iterator[Batch]:
    """Yield the minibatches of several networks, step by step.

    Every epoch shows each of its images once. The last batch of an epoch may be smaller.

    Args:
        images: images [n c h w] of each network, the same n for all. They may lie in main memory, see `rows_on`.
        targets: classes [n] or probabilities [n k] of each network's images, on the device.
        seeds: seed of each network's order and augmentation.
        epochs: numbers of the epochs, from 0.
        batch_size: images of a network in one step.
        augmentation: strategy of operations, see `core.images.augment`; "" for none.
        seen: function from an epoch's number to the indices of its images; `None` for all images in every epoch.
    """
    count, device = len(images[0]), targets[0].device
    rows_of: Callable[[int], int | NDArray[np.int64]] = seen or (lambda epoch: count)
    every = ((epoch, batch, last) for epoch in epochs for batch, last in _numbered(rows_of(epoch), batch_size))
    of_a_step = len(seeds) * min(batch_size, count) * 4 * math.prod(images[0].shape[1:])
    orders: list[NDArray[np.int64]] = []
    while block := list(islice(every, max(1, BLOCK_BYTES // of_a_step))):
        rows: list[list[NDArray[np.int64]]] = [[] for _ in seeds]
        draws: list[list[Augmentation]] = [[] for _ in seeds]
        for epoch, batch, _ in block:
            if batch == 0:
                orders = [generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(rows_of(epoch)) for seed in seeds]
            for number, seed in enumerate(seeds):
                chosen = orders[number][batch * batch_size : (batch + 1) * batch_size]
                random = generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch)
                rows[number].append(chosen)
                draws[number].append(draw_augmentation(augmentation, len(chosen), random))
        sizes = [len(chosen) for chosen in rows[0]]
        x, y = list[Tensor](), list[tuple[Tensor, ...]]()
        for number, (own_images, own_targets) in enumerate(zip(images, targets, strict=True)):
            place = torch.from_numpy(np.concatenate(rows[number]))
            x += rows_on(own_images, place, device).split(sizes)
            y.append(own_targets[place.to(device)].split(sizes))
        x = augment_batches(x, [draw for own in draws for draw in own])
        for number, (epoch, _, is_last) in enumerate(block):
            inputs = torch.stack(x[number :: len(block)])
            yield Batch(epoch, is_last, inputs, torch.stack([own[number] for own in y]))


def _numbered(rows: int | NDArray[np.int64], batch_size: int) -> Iterator[tuple[int, bool]]:
    """Yield for each batch of an epoch its number, from 0, and whether it is the last.

    Args:
        rows: indices of the epoch's images, or their count.
    """
    count = rows if isinstance(rows, int) else len(rows)
    batches = -(-count // batch_size)
    return ((number, number == batches - 1) for number in range(batches))


def rows_on(images: Images, rows: Tensor, device: torch.device) -> Tensor:
    """Copy the images at the indices `rows` to the device; from main memory to a GPU through pinned memory.

    Args:
        rows: indices of the images, in main memory.
        device: device of the result. A GPU may come without its index.
    """
    if not isinstance(images, Tensor):
        return torch.from_numpy(images[rows.numpy()]).to(device)
    if images.device.type != "cpu" or device.type == "cpu":  # `cuda` and `cuda:0` are unequal
        return images[rows.to(images.device)].to(device)
    pinned = torch.empty(len(rows), *images.shape[1:], dtype=images.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(images, 0, rows, out=pinned).to(device, non_blocking=True)
