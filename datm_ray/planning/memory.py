"""Estimates of the main memory that Ray reserves for each worker of a stage: its process, and tensors with a margin.

A distilling worker's memory is planned in `stages/methods/memory.py`, with the same accuracy. Images of the data set
are left out, because the workers of a node share them. Accuracy: benchmarks/README.md. Tests:
tests/planning/test_memory.py.
"""

from __future__ import annotations

import math

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.images.batches import BLOCK_BYTES
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES
from datm_ray.core.training.loop import SCORING_BATCH, Schedule, scoring_schedule
from datm_ray.runtime.machine.devices import MOST_READERS, uses_gpu
from datm_ray.shape import DataShape, network_cost, prior_cost
from datm_ray.stages.evaluate.memory import teacher_bytes
from datm_ray.stages.experts.progress import LARGEST_WRITE
from datm_ray.stages.labels import labelling_bytes, records_bytes
from datm_ray.stages.methods.memory import MARGIN, PROCESS_BYTES, plans_of

TRAINING_PROCESS_BYTES = 900 * 2**20
"""Bytes of main memory of a CPU worker that trains networks, without its tensors. Measured: 790 to 830 MiB, and 940 MiB
with compiled steps of experts on small tensors."""
GPU_PROCESS_BYTES = 4 * 2**30
"""Bytes of main memory of a worker that computes on a GPU. Assumed: CUDA's libraries and context take 2 to 3 GiB."""
STACKED_MAPS, ALONE_MAPS = 3, 1.25
"""Peak memory of a training step, as a multiple of the bytes that all layers write in one forward pass.

STACKED_MAPS: networks trained together, which a CPU computes in small parts; measured up to 3.4. ALONE_MAPS: one
network; measured 1.3 to 1.5. The factor `MARGIN` comes on top.
"""
VECTORS = 8
"""Memory of a network in training beside its feature maps, as a multiple of its parameters. Estimated: parameters,
gradient, velocity, updated parameters, and four more vectors for GSAM."""
SET_COPIES_READ = 2
"""Number of copies of a synthetic set that main memory holds while the set is read: parts of its file, and the images.
Counted in the program, not measured."""
STREAM_BYTES, PHOTO_BYTES = 256 * 2**20, 64 * 2**20
"""Bytes of main memory to read streamed images: for encoded row groups of a Parquet file, and in each thread for one
photograph of 20 megapixels at full size. Assumed."""


def distilling_memory(config: RunConfig, shape: DataShape, sharing: int = 0) -> int:
    """Bytes of main memory to reserve for each worker that distils a set: what the largest of them needs.

    Args:
        sharing: number of distilling workers that share one machine's memory; 0 to count those of this set alone.

    Raises:
        ConfigError: workers compute on CPUs, and one would need more memory than it may take, or there are more shards
            than classes.
    """
    if uses_gpu(config.cluster):
        return _gpu_worker_bytes(shape)
    saved = 0 if config.cluster.compile else PROCESS_BYTES - TRAINING_PROCESS_BYTES
    return max(plan.total for plan in plans_of(config, shape, sharing)) - saved


def experts_memory(config: RunConfig, shape: DataShape, stacked: int) -> int:
    """Bytes of main memory to reserve for a worker that trains stacks of `stacked` experts of `config.network`."""
    settings, vector = config.experts, 4 * stacked * network_cost(config, shape).parameters
    # Held twice: as single epochs, and stacked for the file.
    written = 2 * min(LARGEST_WRITE + vector, vector * (settings.epochs + 1))
    rows, scored = min(settings.batch_size, shape.training_images), SCORING_BATCH if settings.test_every else 0
    return _training_memory(config, shape, rows, stacked, written, scored, is_stack=True)


def prior_memory(config: RunConfig, shape: DataShape) -> int:
    """Bytes of main memory to reserve for a worker that trains the run's prior. The run must have a prior."""
    assert config.prior is not None
    if uses_gpu(config.cluster.shaped(light=True)):
        return _gpu_worker_bytes(shape)
    cost, _ = prior_cost(config.prior, shape.image)
    maps = 2 * STACKED_MAPS * config.prior.batch_size * cost.maps  # an encoder is about as large as its decoder
    values = math.prod(shape.image)
    is_whitened = config.dataset.resolved(shape.image[1:]).kind == "zca"
    pixels = 4 * values * (shape.training_images + values) if is_whitened else 0  # and the matrix that undoes it
    tensors = math.ceil(MARGIN * (maps + 2 * VECTORS * 4 * cost.parameters))
    return TRAINING_PROCESS_BYTES + tensors + pixels + _reading_bytes(shape, _light_threads(config))


def scoring_memory(
    config: RunConfig,
    shape: DataShape,
    images: int,
    network: NetworkConfig | None = None,
    together: int = 1,
    *,
    held: int = 0,
    sets: int = 1,
    schedule: Schedule | None = None,
    has_teacher: bool = False,
) -> int:
    """Bytes of main memory to reserve for a worker that trains a network on `images` images and scores it.

    Args:
        network: scored network; `None` for the backbone.
        together: number of networks that are trained together.
        held: number of other networks in the worker's memory at the same time, trained already or still to be trained.
        sets: number of different sets of `images` images that the worker holds; 0 if the images are the data set's,
            which the workers of a node share.
        schedule: schedule of the training; `None` for that of the distilled set's row.
        has_teacher: True if the worker holds the run's teacher, which labels every batch.
    """
    if uses_gpu(config.cluster.shaped(light=True)):
        copies = sets + SET_COPIES_READ - 1 if sets else 0  # sets are read one after another
        return _gpu_worker_bytes(shape) + copies * images * shape.row
    schedule = schedule or scoring_schedule(config.evaluate, 1.0)
    rows = min(schedule.batch_size, images)
    at_once = min(schedule.micro_batch or rows, rows)
    own = config.model_copy(update={"network": network or config.network})
    tensors = 4 * held * network_cost(own, shape).parameters + sets * images * shape.row
    if has_teacher:
        tensors += teacher_bytes(config, shape, at_once)
    is_stack = together > 1 and own.network.norm != "batch"
    return _training_memory(own, shape, rows, together, tensors, SCORING_BATCH, is_stack=is_stack, at_once=at_once)


def labelling_memory(config: RunConfig, shape: DataShape) -> int:
    """Bytes of main memory to reserve for a worker that labels the run's synthetic set with its teacher."""
    images = shape.synthetic(config)
    held, records = SET_COPIES_READ * images * shape.row, records_bytes(config, shape)
    if uses_gpu(config.cluster.shaped(light=True)):
        return GPU_PROCESS_BYTES + held + records
    return TRAINING_PROCESS_BYTES + math.ceil(MARGIN * held) + records + labelling_bytes(config, shape, images)


def _gpu_worker_bytes(shape: DataShape) -> int:
    """Bytes of main memory of a worker that computes on a GPU: its process, and threads that read streamed images."""
    return GPU_PROCESS_BYTES + _reading_bytes(shape, MOST_READERS)


def _reading_bytes(shape: DataShape, threads: int) -> int:
    """Bytes of main memory of threads that read streamed images; 0 if no images are streamed."""
    return shape.is_streamed * (STREAM_BYTES + threads * PHOTO_BYTES)


def _light_threads(config: RunConfig) -> int:
    return config.cluster.shaped(light=True).threads_per_worker


def _training_memory(
    config: RunConfig,
    shape: DataShape,
    rows: int,
    networks: int,
    held: int,
    scored: int,
    *,
    is_stack: bool,
    at_once: int | None = None,
) -> int:
    """Bytes of main memory to reserve for a worker that trains `networks` networks, each on `rows` images in a step.

    The worker holds other tensors of `held` bytes. Between steps, a network classifies `scored` images in one batch. A
    step computes `at_once` images at a time; `None` for all. If the networks are a stack (`is_stack`), steps are
    computed in parts that fit the cache of a CPU.
    """
    if uses_gpu(config.cluster.shaped(light=True)):
        return _gpu_worker_bytes(shape)
    cost, at_once = network_cost(config, shape), at_once or rows
    if is_stack and config.network.norm != "batch":  # other networks compute whole batches, one by one
        at_once = min(rows * networks, max(networks, CACHED_MAP_BYTES // cost.largest))
    maps = max((STACKED_MAPS if is_stack else ALONE_MAPS) * at_once * cost.maps, 2 * scored * cost.largest)
    next_images = 3 * max(BLOCK_BYTES, rows * networks * shape.row)  # before and after their augmentation
    tensors = maps + next_images + 4 * VECTORS * networks * cost.parameters + held
    return TRAINING_PROCESS_BYTES + math.ceil(MARGIN * tensors) + _reading_bytes(shape, _light_threads(config))
