"""Main memory of one worker of each stage, which Ray reserves for it, so that no node gets more workers than it holds.

An estimate is a worker's process and what it holds. Images of the data set are left out: the workers of a node share
them in Ray's object store. On GPUs only the process counts, because tensors are in the GPU's memory, and its size is
assumed. Estimates on CPUs are 0 to 30 % above measured peaks: tests/planning/test_main_memory.py.
"""

from __future__ import annotations

import math

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.batches import BLOCK_BYTES
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES
from datm_ray.core.training import SCORING_BATCH, scoring_schedule
from datm_ray.planning.fit import MARGIN, PROCESS_BYTES, Layout, plans_of
from datm_ray.planning.shape import DataShape, network_cost
from datm_ray.runtime.devices import uses_gpu
from datm_ray.stages.expert_progress import LARGEST_WRITE
from datm_ray.stages.registry import teacher_of

PLAIN_PROCESS_BYTES, COMPILING_PROCESS_BYTES = 900 * 2**20, 1000 * 2**20
"""Memory of a CPU worker that compiles nothing, and of one that compiles steps of experts, without their tensors.
Measured: 790 to 830 MiB and about 940 MiB with small tensors."""
GPU_PROCESS_BYTES = 4 * 2**30
"""Main memory of a worker that computes on a GPU. Assumed: libraries and the context of CUDA take 2 to 3 GiB."""
EXPERT_MAPS, SCORED_MAPS = 3, 1.25
"""Peak memory of a training step, as a multiple of the bytes that all layers write in one forward pass. Measured: up to
3.4 for experts, whose calls are small on CPUs, and 1.3 to 1.5 for networks that are scored; `MARGIN` comes on top."""
VECTORS = 8
"""Number of parameter vectors of a network in training: parameters, gradients, velocity, GSAM's and updated ones."""


def experts_memory(config: RunConfig, shape: DataShape, stacked: int) -> int:
    """Bytes of main memory of a worker that trains stacks of `stacked` experts of `config.network`."""
    if uses_gpu(config.cluster.shaped(light=True)):
        return GPU_PROCESS_BYTES
    cost, settings = network_cost(config, shape), config.experts
    rows, vector = min(settings.batch_size, shape.training_images), 4 * stacked * cost.parameters
    chunk = min(rows * stacked, max(stacked, CACHED_MAP_BYTES // cost.largest))
    if config.network.norm == "batch":  # computed whole, one expert after the other
        chunk = rows
    written = 2 * min(LARGEST_WRITE + vector, vector * (settings.epochs + 1))  # as epochs, and stacked for the file
    tensors = EXPERT_MAPS * chunk * cost.maps + 3 * rows * stacked * shape.row + VECTORS * vector + written
    return (COMPILING_PROCESS_BYTES if config.cluster.compile else PLAIN_PROCESS_BYTES) + math.ceil(MARGIN * tensors)


def scoring_memory(
    config: RunConfig,
    shape: DataShape,
    images: int,
    network: NetworkConfig | None = None,
    together: int = 1,
    *,
    is_shared: bool = False,
) -> int:
    """Bytes of main memory of a worker that trains a network on `images` images and scores it.

    Args:
        network: scored network; `None` for the backbone.
        together: number of networks that are trained together.
        is_shared: True if the images are the data set's, which the workers of a node share.
    """
    if uses_gpu(config.cluster.shaped(light=True)):
        return GPU_PROCESS_BYTES
    cost = network_cost(config.model_copy(update={"network": network or config.network}), shape)
    rows = together * min(scoring_schedule(config.evaluate, 1.0).batch_size, images)
    maps = max(SCORED_MAPS * rows * cost.maps, 2 * SCORING_BATCH * cost.largest)
    process = PLAIN_PROCESS_BYTES
    if together > 1:
        chunk = min(rows, max(together, CACHED_MAP_BYTES // cost.largest))
        maps, process = max(EXPERT_MAPS * chunk * cost.maps, 2 * SCORING_BATCH * cost.largest), COMPILING_PROCESS_BYTES
    if config.evaluate.labels != "own":
        teacher = network_cost(teacher_of(config), shape)
        maps += 2 * rows * teacher.largest + 4 * teacher.parameters
    held = 0 if is_shared else together * images * shape.row
    prepared = 3 * max(BLOCK_BYTES, rows * shape.row)  # images of the next steps, before and after their augmentation
    return process + math.ceil(MARGIN * (maps + held + prepared + 4 * VECTORS * together * cost.parameters))


def distilling_memory(config: RunConfig, shape: DataShape, layout: Layout | None = None) -> int:
    """Bytes of main memory of the largest rank that distils a set, see `plans_of` for arguments and errors."""
    if uses_gpu(config.cluster):
        return GPU_PROCESS_BYTES
    saved = 0 if config.cluster.compile else PROCESS_BYTES - PLAIN_PROCESS_BYTES
    return max(plan.total for plan in plans_of(config, shape, layout)) - saved
