"""What an iteration of trajectory matching takes: student steps, their stored parameters, and the reverse pass.

General planning knows a method by its `Demand`, and by lines for people. Tests: tests/planning/test_fit.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from datm_ray.config import RunConfig
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.methods.trajectory.distance import Distance

COMPILED_MAPS, UNCOMPILED_MAPS = 2, 9
"""Peak memory of a student step, as a multiple of the bytes that all layers write in one forward pass. Measured: 1.8 to
1.9 compiled, 7.3 to 8.9 without."""
NETWORK_VECTORS = 8
"""Vectors of p numbers beside the trace: two networks, target, v, and sums of gradients."""


@dataclass(frozen=True)
class Demand:
    """What one iteration takes on one worker for one network; plans of memory and time are made of it."""

    passes: Mapping[str, float]
    """Kind of work, a key of `FORWARD_PASSES` -> images that pass through the network."""
    at_once: int
    """Most images that are in the network at a time. Micro-batches divide them where memory is short."""
    maps: int
    """Peak memory of a micro-batch, as a multiple of the bytes that all layers write in one forward pass."""
    vectors: int
    """Vectors as long as the network's parameters that are held all the time: networks, gradients, sums."""
    trace: int = 0
    """Bytes that are held through the iteration beside these."""
    summed: int = 0
    """Bytes that are summed over class shards."""
    sums: int = 0
    """Number of these sums."""


def demand(config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
    """Student steps on the minibatches of a shard, whose trace is held, and sums of two vectors for each."""
    settings, images = config.distill, config.distill.ipc * classes
    rows = rows_at_a_time(images, settings.ipc * -(-classes // shards), min(settings.batch_size, images))
    steps, vector = settings.student_steps, 4 * cost.parameters
    return Demand(
        {"matching": steps * rows},
        at_once=rows,
        maps=COMPILED_MAPS if config.cluster.compile else UNCOMPILED_MAPS,
        vectors=NETWORK_VECTORS,
        trace=(steps + 1) * vector,
        summed=steps * (2 * vector + 4) if shards > 1 else 0,
        sums=2 * steps,
    )


def described(config: RunConfig, images: int, chunk: int) -> str:
    """Iterations and student steps in words."""
    settings, batch = config.distill, min(config.distill.batch_size, images)
    steps = f"{settings.student_steps:,} student steps of {batch:,} of {images:,} images"
    return f"{settings.iterations:,} iterations of {steps}, in micro-batches of {chunk:,}"


def outlook(config: RunConfig, training_images: int) -> Distance:
    """How far experts and the student go."""
    return Distance.of(config, training_images)


def rows_at_a_time(images: int, held: int, batch: int) -> int:
    """Images of a minibatch that a shard must be ready for: all but one in a thousand minibatches have no more.

    A minibatch is drawn without regard to shards, so a shard's part varies. Micro-batches of the average part would
    need a second call for a few images in half of all steps.

    Args:
        images: images of the whole set.
        held: images of the shard.
        batch: images of a minibatch, over all shards.
    """
    share = held / images
    spread = math.sqrt(batch * share * (1 - share) * (images - batch) / max(1, images - 1))
    return min(held, batch, math.ceil(batch * share + 3 * spread))
