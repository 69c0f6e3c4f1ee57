"""Tests minibatches against their obvious making, and what a device gets for them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datm_ray.core.images import batches as module
from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.images.batches import Batch, batches
from datm_ray.core.randomness import Purpose, generator
from tests.other_device import DEVICE, OtherDevice

STRATEGY = "color_crop_cutout_flip_scale_rotate_resized+flip"
COUNT, SIZE, SEEDS = 22, 8, [5, 6, 7]


def images_of(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def expected(images: list[Tensor], targets: list[Tensor], strategy: str, epochs: int) -> list[Batch]:
    """Every batch by itself: its images are read and augmented alone."""
    made = []
    for epoch in range(epochs):
        orders = [generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(COUNT) for seed in SEEDS]
        for batch, first in enumerate(range(0, COUNT, SIZE)):
            rows = [torch.from_numpy(order[first : first + SIZE]) for order in orders]
            draws = [generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch) for seed in SEEDS]
            x = [
                augment(own[row], draw_augmentation(strategy, len(row), draw))
                for own, row, draw in zip(images, rows, draws, strict=True)
            ]
            y = [own[row] for own, row in zip(targets, rows, strict=True)]
            made.append(Batch(epoch, first + SIZE >= COUNT, torch.stack(x), torch.stack(y)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", [STRATEGY, "crop", ""])
@pytest.mark.parametrize("block", [1, 2**14, 2**24])
def test_batches_equal_those_made_one_by_one(
    monkeypatch: pytest.MonkeyPatch, strategy: str, block: int, dtype: torch.dtype
) -> None:
    """Batches have the bits of batches made alone, whether networks share images or not, for blocks of any size."""
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    shared, own = [images_of(0, dtype)] * 3, [images_of(seed, dtype) for seed in range(3)]
    labels = [torch.arange(COUNT) + 100 * seed for seed in range(3)]
    for images, targets in ((shared, labels[:1] * 3), (own, labels), (own[:2] + own[:1], labels)):
        found = list(batches(images, targets, SEEDS, range(2), SIZE, strategy))
        for batch, other in zip(found, expected(images, targets, strategy, 2), strict=True):
            assert batch[:2] == other[:2]
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.targets, other.targets)


class Read:
    """Images that are read when they are indexed."""

    def __init__(self, images: Tensor) -> None:
        self.shape, self._images = images.shape, images.numpy()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: Any) -> Any:
        return self._images[rows]


def test_streamed_images_give_the_same_batches() -> None:
    """Images that are read from files give the batches of a tensor."""
    images, targets = images_of(0, torch.float32), [torch.arange(COUNT)] * 3
    streamed, held = (
        list(batches([each] * 3, targets, SEEDS, range(1), SIZE, STRATEGY)) for each in (Read(images), images)
    )
    for batch, other in zip(streamed, held, strict=True):
        assert torch.equal(batch.images, other.images)


class Counted(TorchDispatchMode):
    """Counts copies to the device, and gathers on it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and run it."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != DEVICE and result.device == DEVICE:
            self.found["copies"] += 1
        if func is torch.ops.aten.index.Tensor:
            self.found["gathers"] += 1
        return result


@pytest.mark.parametrize(("networks", "epochs"), [(1, 1), (8, 1), (8, 5)])
def test_a_block_takes_two_copies_and_a_gather(monkeypatch: pytest.MonkeyPatch, networks: int, epochs: int) -> None:
    """However many networks and steps a block has, its numbers come in two copies, and nothing is read back."""
    monkeypatch.setattr(OtherDevice, "_read", lambda *_: pytest.fail("the device was waited for"))
    with OtherDevice():
        images, targets = torch.empty(COUNT, 3, 8, 8, device=DEVICE), torch.empty(COUNT, 4, device=DEVICE)
        with Counted() as counted:
            made = list(
                batches([images] * networks, [targets] * networks, range(networks), range(epochs), SIZE, STRATEGY)
            )
    assert len(made) == 3 * epochs
    assert counted.found == {"copies": 2, "gathers": 2}


def test_blocks_of_a_gpu_are_large_and_leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's blocks have 256 MiB, or a share of its free memory if this is less; those of a CPU stay."""
    for free, size in ((2**40, 2**28), (2**30, 2**26)):
        monkeypatch.setattr(module, "free_gpu_memory", lambda free=free: free)
        assert module._block_bytes(torch.device("cuda", 0)) == size
    assert module._block_bytes(torch.device("cpu")) == 2**24
