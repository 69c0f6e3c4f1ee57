"""Distribution matching (DM, arXiv 2110.04181): equal mean embeddings of real and synthetic images, class by class.

    L = sum over classes c of | mean psi(A_c(real images of c)) - mean psi(A_c(synthetic images of c)) |^2

psi is the embedding of a network with random parameters, drawn anew in every iteration: the classifier's input. A_c is
one operation of DSA, with the same parameters for all real and synthetic images of a class. Every class has its own
loss, so classes can be divided over workers without sums between them. Means are sums over images, so micro-batches are
exact.

Shapes: n synthetic images of this process, m real images of a class, c h w image, d numbers of an embedding.
Tests: tests/methods/test_distribution.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datm_ray.core.images.augment import Augmentation, augment, draw_augmentation
from datm_ray.core.networks.registry import embedding
from datm_ray.core.randomness import Purpose, generator


def draw_shared(strategy: str, seed: int, iteration: int, label: int) -> Augmentation:
    """Draw the augmentation, of one sample, that an iteration applies to all images of one class.

    Args:
        strategy: operations, see `core.images.augment`.
        seed: seed of the run.
        iteration: number of iterations done.
        label: the class.
    """
    return draw_augmentation(strategy, 1, generator(seed, Purpose.SHARED_AUGMENTATION, iteration, label))


def distance_and_gradient(
    network: nn.Module,
    synthetic: Tensor,
    real: Sequence[Tensor],
    augmentations: Sequence[Augmentation],
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss [] with one network, and its exact gradient [n c h w] in the synthetic images.

    Only the graph of one micro-batch is kept.

    Args:
        network: network whose parameters need no gradient.
        synthetic: [n c h w] images, class by class, the same number of each class.
        real: real images [m c h w] of each class.
        augmentations: augmentation of one sample for each class.
        chunk: number of images of a micro-batch; `None` for all images of a class.
    """
    gradient, loss, ipc = torch.zeros_like(synthetic), synthetic.new_zeros(()), len(synthetic) // max(1, len(real))
    for number, (images, augmentation) in enumerate(zip(real, augmentations, strict=True)):
        rows = slice(number * ipc, (number + 1) * ipc)
        gap = _mean(network, synthetic[rows], augmentation, chunk) - _mean(network, images, augmentation, chunk)
        loss += gap.square().sum()
        for part in range(rows.start, rows.stop, chunk or ipc):
            piece = slice(part, min(part + (chunk or ipc), rows.stop))
            raw = synthetic[piece].detach().requires_grad_()
            along = (embedding(network, augment(raw, repeated(augmentation, len(raw)))) @ gap).sum() * (2 / ipc)
            gradient[piece] = torch.autograd.grad(along, raw)[0]
    return loss, gradient


@torch.no_grad()
def _mean(network: nn.Module, images: Tensor, augmentation: Augmentation, chunk: int | None) -> Tensor:
    """Mean embedding [d] of the images after augmentation, `chunk` images at a time; `None` takes all at once.

    The augmentation of one sample is applied to all images.
    """
    parts = images.split(chunk or len(images))
    sums = [embedding(network, augment(part, repeated(augmentation, len(part)))).sum(dim=0) for part in parts]
    return torch.stack(sums).sum(dim=0) / len(images)


def repeated(augmentation: Augmentation, count: int) -> Augmentation:
    """Augmentation of one sample for `count` images, all alike."""
    return augmentation.take(np.zeros(count, np.int64))
