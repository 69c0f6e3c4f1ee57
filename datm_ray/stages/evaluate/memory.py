"""GPU memory of a worker that scores networks: what a training step takes beside the images, and how to lower it.

Tests: tests/stages/evaluate/test_memory.py.
"""

from __future__ import annotations

import math

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.images.batches import GPU_BLOCK_BYTES
from datm_ray.core.training.loop import OPTIMISERS, SCORING_BATCH, scoring_schedule
from datm_ray.runtime.machine.devices import uses_gpu
from datm_ray.shape import DataShape, network_cost
from datm_ray.stages.methods.memory import IMAGE_COPIES, MARGIN, laid_out, worker_budget
from datm_ray.stages.methods.registry import teacher_of
from datm_ray.words import data_size

KEPT_MAPS = 0.8
"""Bytes kept for the backward pass, as a share of all bytes that the layers write in a forward pass. Counted by torch's
hooks on saved tensors: 0.58 to 0.70 for ResNets, ConvNets and ViT, 0.83 for VGG-11, 0.98 for MobileNetV2. The factor
`MARGIN`, which comes on top, covers the higher ones."""
NETWORK_VECTORS = 3 + max(len(each.vectors) for each in OPTIMISERS.values())
"""Number of vectors of parameter size that a network in training takes on a GPU: parameters, gradient, updated values,
and those of the optimiser that keeps most."""
BLOCK_COPIES = 3
"""Number of copies of the images of a block: before, during and after augmentation. A block is some training steps
whose images are augmented in one call."""
HELPS = 0.9
"""Micro-batches are recommended if a training step in micro-batches takes at most this share of the memory of an
undivided step."""


def scoring_step_bytes(config: RunConfig, shape: DataShape, images: int, network: NetworkConfig | None = None) -> int:
    """Estimated peak bytes of GPU memory for training and scoring one network, beside the images of its training set.

    If the recipe has a teacher that labels images, the teacher's memory is included.

    Args:
        images: number of images that the network is trained on.
        network: scored network; `None` for the backbone.
    """
    rows = min(scoring_schedule(config.evaluate, 1.0).batch_size, images)
    at_once = min(config.evaluate.micro_batch or rows, rows)
    cost = network_cost(config.model_copy(update={"network": network or config.network}), shape)
    prepared = max(IMAGE_COPIES * rows * shape.row, BLOCK_COPIES * GPU_BLOCK_BYTES)
    step = at_once * (KEPT_MAPS * cost.maps + 2 * cost.largest) + prepared
    tensors = max(step, 2 * SCORING_BATCH * cost.largest) + 4 * NETWORK_VECTORS * cost.parameters
    if config.evaluate.has_teacher:
        tensors += teacher_bytes(config, shape, at_once)
    return math.ceil(MARGIN * tensors)


def teacher_bytes(config: RunConfig, shape: DataShape, at_once: int) -> int:
    """Estimated bytes of GPU memory that a run's teacher takes, to label `at_once` images at a time."""
    teacher = network_cost(teacher_of(config), shape)
    return 2 * at_once * teacher.largest + 4 * teacher.parameters


def largest_scored(config: RunConfig, shape: DataShape) -> NetworkConfig | None:
    """Scored network of the run whose training step on the run's set takes most GPU memory; `None` for the backbone."""
    images = shape.synthetic(config)
    return max((None, *config.scored_networks), key=lambda each: scoring_step_bytes(config, shape, images, each))


def gpu_bytes(config: RunConfig, shape: DataShape) -> int | None:
    """Estimated peak bytes of GPU memory for the run's scored network that needs most; `None` if CPUs train it.

    The bytes of the set are not counted: the set stays in main memory where a GPU has too little.
    """
    if not uses_gpu(config.cluster.shaped(light=True)):
        return None
    return scoring_step_bytes(config, shape, shape.synthetic(config), largest_scored(config, shape))


def described_step(config: RunConfig, shape: DataShape, size: float | None) -> str:
    """Text for plans: GPU memory for training the scored network that takes most, and a remedy if it is too much.

    Returns "" if CPUs train it.

    Args:
        size: memory in bytes of a worker's whole GPU, infinite if unknown; `None` if it is a GPU of this machine.
    """
    if (needed := gpu_bytes(config, shape)) is None:
        return ""
    light = config.model_copy(update={"cluster": config.cluster.shaped(light=True)})
    # `cluster.memory` limits distilling workers alone.
    part = light.cluster.gpus_per_worker or 1.0
    limit = worker_budget(laid_out(light, {"memory": None})) if size is None else part * size
    if needed <= limit:
        return f", {data_size(needed)} of a GPU"
    remedy = memory_remedy(config, shape, "distilled", largest_scored(config, shape))
    return f", {data_size(needed)} of a GPU where {data_size(limit)} may be taken: {remedy}"


def memory_remedy(config: RunConfig, shape: DataShape, row: str, network: NetworkConfig | None = None) -> str:
    """What a user can do if networks of a row of the accuracy table exhaust a GPU's memory, as part of a sentence.

    Args:
        row: key of `ALL_ROWS`.
        network: scored network; `None` for the backbone.
    """
    if row == "full":
        return "leave this row out with --skip-full"
    settings, images = config.evaluate, shape.synthetic(config)
    rows = min(scoring_schedule(settings, 1.0).batch_size, images)
    less = max(1, min(settings.micro_batch or rows, rows) // 4)
    parts = config.model_copy(update={"evaluate": settings.model_copy(update={"micro_batch": less})})
    whole, divided = (scoring_step_bytes(each, shape, images, network) for each in (config, parts))
    if divided <= HELPS * whole:
        return f"compute a step in parts: --set evaluate.micro_batch={less}"
    smaller = f"choose a smaller network{' or teacher' * settings.has_teacher}"
    is_part = (config.cluster.shaped(light=True).gpus_per_worker or 1.0) < 1
    section = "cluster.light" if config.cluster.light else "cluster"
    return f"{smaller}, or use --set {section}.gpus_per_worker=1" if is_part else smaller
