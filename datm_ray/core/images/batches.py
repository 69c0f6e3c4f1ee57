"""Minibatches of networks in training: order, augmentation, and the copy to the device.

Each network has its own order of images and its own augmentation. Both depend only on the network's seed, the epoch and
the number of the batch. Images are gathered and augmented for many steps at a time (a block). A GPU gets all image
indices of a block in one copy, and all augmentation parameters in another. The host waits for neither. Shapes: s
networks, b images of a batch, c h w image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.compute.gpu import free_gpu_memory, sent, uploaded
from datm_ray.core.images.augment import Augmentation, apply_operation, draw_augmentation, width
from datm_ray.core.randomness import Purpose, drawn

BLOCK_BYTES, GPU_BLOCK_BYTES = 2**24, 2**28
"""Largest size in bytes of the images of a block (steps that are prepared together), on CPUs and on GPUs. The images of
a single step may be larger. Larger blocks let a GPU work while the host prepares the next block."""
GPU_BLOCK_SHARE = 1 / 16
"""Largest share of a GPU's free memory for the images of a block (steps that are prepared together); `GPU_BLOCK_BYTES`
is a second limit. The share is small because augmentation makes several copies of these images."""


class ImageReader(Protocol):
    """Images that are read from their files when they are indexed, such as `datm_ray.data.streamed.StreamedImages`."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape (n, c, h, w): number of images, channels, height and width of an image."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64] | slice, /) -> NDArray[np.float32]:
        """Read the m images at these indices, as [m c h w]."""


Images = Tensor | ImageReader
"""Normalised images [n c h w]: a tensor, or a reader that loads images when they are indexed."""


class Batch(NamedTuple):
    """Minibatches of s networks, one for each, for one training step."""

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
    """Yield the minibatches of several networks that are trained together, step by step.

    Every epoch shows each image that it has (see `seen`) once. The last batch of an epoch may be smaller.

    Args:
        images: images [n c h w] of each network, the same n for all. They may lie in main memory or in files.
        targets: classes [n] or probabilities [n k] of each network's images, on the device of the batches.
        seeds: seed of each network's order and augmentation.
        epochs: numbers of the epochs, from 0.
        batch_size: images of a network in one step.
        augmentation: strategy such as "crop_flip": each batch gets one of its operations; "" for none. An operation
            that does not exist raises a `ConfigError`.
        seen: function from an epoch's number to the indices of its images; `None` for all images in every epoch.
    """
    count, device = len(images[0]), targets[0].device
    rows_of = seen or (lambda epoch: np.arange(count))
    every = ((epoch, batch, last) for epoch in epochs for batch, last in _numbered(len(rows_of(epoch)), batch_size))
    of_a_step = len(seeds) * min(batch_size, count) * 4 * math.prod(images[0].shape[1:])
    orders, steps = list[NDArray[np.int64]](), max(1, _block_bytes(device) // of_a_step)
    while block := list(islice(every, steps)):
        minibatches: list[list[_Minibatch]] = [[] for _ in seeds]
        for step, (epoch, batch, _) in enumerate(block):
            if batch == 0:
                orders = [_order(rows_of(epoch), seed, epoch) for seed in seeds]
            for number, seed in enumerate(seeds):
                rows = orders[number][batch * batch_size : (batch + 1) * batch_size]
                made = _augmentation(augmentation, len(rows), seed, epoch, batch)
                minibatches[number].append(_Minibatch(number, step, rows, made))
        x, y = _placed([each for own in minibatches for each in own], images, targets)
        for step, (epoch, _, is_last) in enumerate(block):
            inputs, wanted = (torch.stack([each[number, step] for number in range(len(seeds))]) for each in (x, y))
            yield Batch(epoch, is_last, inputs, wanted)


def _order(rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle the indices `rows` of an epoch's images into a network's random order. `seed` is the network's."""
    return drawn(lambda random: random.permutation(rows), seed, Purpose.TRAINING_ORDER, epoch)


def _augmentation(strategy: str, images: int, seed: int, epoch: int, batch: int) -> Augmentation:
    """Draw the augmentation of batch number `batch` of an epoch. `images` is the number of its images."""
    purpose = Purpose.TRAINING_AUGMENTATION
    return drawn(lambda random: draw_augmentation(strategy, images, random), seed, purpose, epoch, batch)


def _block_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return BLOCK_BYTES
    return min(GPU_BLOCK_BYTES, int(GPU_BLOCK_SHARE * free_gpu_memory()))


class _Minibatch(NamedTuple):
    """Minibatch of network number `network` for step number `step` of a block (steps that are prepared together)."""

    network: int
    step: int
    rows: NDArray[np.int64]
    """[b] indices of the minibatch's images in the data set."""
    augmentation: Augmentation


_Placed = dict[tuple[int, int], Tensor]
"""(network, step of a block) -> images [b c h w], or targets [b] or [b k], of that minibatch, on the device."""


def _placed(
    minibatches: Sequence[_Minibatch], images: Sequence[Images], targets: Sequence[Tensor]
) -> tuple[_Placed, _Placed]:
    """Gather and augment, on the device, all minibatches of a block, the steps that are prepared together.

    Minibatches with the same augmentation operation lie side by side, so that each of these operations is called once.
    No augmentation mixes images.

    Args:
        minibatches: minibatches of all networks in all steps of the block.
        images: images [n c h w] of each network. They may lie in main memory or in files.
        targets: classes [n] or probabilities [n k] of each network's images, on the device.

    Returns:
        The augmented images, then the targets: for each, (network, step of the block) -> tensor of the minibatch.
    """
    operations = list(dict.fromkeys(batch.augmentation.operation for batch in minibatches))
    minibatches = sorted(minibatches, key=lambda batch: operations.index(batch.augmentation.operation))
    device, sizes = targets[0].device, [len(batch.rows) for batch in minibatches]
    rows = uploaded([batch.rows for batch in minibatches], device)
    x = _gathered(images, minibatches, rows)
    numbers = [batch.augmentation.parameters.ravel() for batch in minibatches]  # flat: widths differ by operation
    uniform, parts, first, used = uploaded(numbers, device, x.dtype), list[Tensor](), 0, 0
    for operation, same in groupby(minibatches, key=lambda batch: batch.augmentation.operation):
        own = [len(batch.rows) for batch in same]
        last, end = first + sum(own), used + sum(own) * width(operation)
        parts += apply_operation(x[first:last], operation, uniform[used:end].view(last - first, -1)).split(own)
        first, used = last, end
    places = [(batch.network, batch.step) for batch in minibatches]
    wanted = _gathered(targets, minibatches, rows).split(sizes)
    return dict(zip(places, parts, strict=True)), dict(zip(places, wanted, strict=True))


def _gathered(sources: Sequence[Images], minibatches: Sequence[_Minibatch], rows: Tensor) -> Tensor:
    """Read the images or targets of all minibatches as one tensor on the device, in the order of the minibatches.

    Neighbouring minibatches of the same source are read in one gather.

    Args:
        sources: images or targets of each network.
        minibatches: minibatches of any networks.
        rows: indices of the images of all minibatches, one after another, on the device.
    """
    parts, first = list[Tensor](), 0
    for _, same in groupby(minibatches, key=lambda batch: id(sources[batch.network])):
        own = list(same)
        source, last = sources[own[0].network], first + sum(len(batch.rows) for batch in own)
        if isinstance(source, Tensor) and source.device == rows.device:
            parts.append(source[rows[first:last]])
        else:
            there = torch.from_numpy(np.concatenate([batch.rows for batch in own]))
            parts.append(rows_on(source, there, rows.device))
        first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _numbered(count: int, batch_size: int) -> Iterator[tuple[int, bool]]:
    """Yield for each batch of an epoch of `count` images its number, from 0, and whether it is the last."""
    batches = -(-count // batch_size)
    return ((number, number == batches - 1) for number in range(batches))


def rows_on(images: Images, rows: Tensor, device: torch.device) -> Tensor:
    """Copy the images at the indices `rows` to the device; from main memory to a GPU through pinned memory.

    Args:
        rows: indices of the images, in main memory.
        device: device of the result. A GPU may be named without its index, as "cuda".
    """
    if not isinstance(images, Tensor):
        return sent(torch.from_numpy(images[rows.numpy()]), device)
    if images.device.type != "cpu" or device.type == "cpu":  # `cuda` and `cuda:0` are unequal
        return images[rows.to(images.device)].to(device)
    pinned = torch.empty(len(rows), *images.shape[1:], dtype=images.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(images, 0, rows, out=pinned).to(device, non_blocking=True)
