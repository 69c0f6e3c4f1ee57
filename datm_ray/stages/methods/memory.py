"""Memory of a distilling worker: what takes memory, whether it fits, and how many images a micro-batch has.

The set, parameters and images are counted exactly. Activations are counted as a multiple of what all layers write in
one forward pass (`core/networks/image_cost.py`); the multiple was measured on CPUs. On a GPU a trial step decides in
the end (`chunk_by_trial`). Images of the data set are left out, because the workers of a node share them. Plans use the
same numbers before a run starts (`planning/memory.py`). benchmarks/README.md has the accuracy of these numbers. Tests:
tests/planning/test_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch

from datm_ray.config import ClusterConfig, Role, RunConfig
from datm_ray.core.compute.gpu import CONTEXT_BYTES, GPU_SHARE, free_gpu_memory, gpu_size
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES
from datm_ray.core.prior import KEPT_MAPS, micro_batch
from datm_ray.core.training.loop import PROTOCOLS, SCORING_BATCH
from datm_ray.errors import ConfigError, GpuMemoryError, WorkerLostError
from datm_ray.memory import available_memory
from datm_ray.methods.distribution import even_size
from datm_ray.methods.trajectory.matching import block_bytes
from datm_ray.runtime.machine.devices import uses_gpu, workers_here
from datm_ray.shape import DataShape, network_cost, prior_cost
from datm_ray.stages.methods.base import ALONE, Demand
from datm_ray.stages.methods.part import Part
from datm_ray.stages.methods.registry import method_of
from datm_ray.words import data_size

PROCESS_BYTES = 1200 * 2**20
"""Bytes of a CPU worker that distils, without its tensors. Measured: 935 to 1,200 MiB, the most in a worker that had
trained networks before."""
MARGIN = 1.25
"""Factor on the bytes of all counted tensors, for allocators and workspaces."""
SET_COPIES, IMAGE_COPIES = 5, 6
"""SET_COPIES: number of tensors of a set's size: the set, its momentum, its gradient, the updated set, and the set kept
by validation. IMAGE_COPIES: number of tensors of the size of a micro-batch's images: raw, augmented, kept for the
derivative, and a gradient of each."""
FROZEN_VECTORS = 2
"""Number of vectors as long as the parameters of a MetaDD network: the restored network and its frozen copy."""
META_BYTES, META_IMAGES = 200 * 2**20, (10, 50)
"""Limits of MetaDD's micro-batches on a CPU. META_BYTES: bytes that all layers of the worker's MetaDD networks may
write for one micro-batch. META_IMAGES: range, inclusive, of the limit on images that follows from META_BYTES. Less
memory, or an even division, gives smaller micro-batches. Chosen by hand: small networks took about half as long with 50
images as with 10."""
MEMORY_PARTS = {
    "process": ("the process itself", ""),
    "synthetic": ("its share of the synthetic set", "distill.ipc"),
    "network": ("the network and sums of its gradients", "network.width"),
    "trace": ("the trace of the student's steps", "distill.student_steps"),
    "block": ("student steps' images that are augmented together", ""),
    "call": ("one micro-batch", "network.width or dataset.resize"),
    "validation": ("validation", "network.width or dataset.resize"),
    "prior": ("a micro-batch through the prior's decoder", "prior.width"),
    "meta": ("the networks of metadd", "dataset.resize, or choose smaller metadd.auxiliaries"),
}
"""Part of a worker's memory -> what it is, and which setting makes it smaller; "" if none does."""


@dataclass(frozen=True)
class DistillationPlan:
    """Memory plan of a worker for one of its backbones, or of a worker that only computes MetaDD."""

    name: str
    """Phrase that says what the worker does, such as "distils birds", for messages."""
    budget: float
    """Bytes that the worker may take; infinite if this process cannot see its GPU."""
    parts: Mapping[str, int]
    """Part of the worker's memory, a key of `MEMORY_PARTS` -> bytes that it takes."""
    chunk: int
    """Number of images of a micro-batch: as many as memory and a CPU's cache allow; 0 for a worker of MetaDD alone.

    Micro-batches of a step are nearly equal."""
    demand: Demand
    """Work and memory of an iteration of the method."""
    meta_chunk: int = 0
    """Number of images in MetaDD's networks at a time: as many as memory allows, and on CPUs only as many as compute
    fast; 0 without MetaDD networks."""
    error: type[ConfigError] = ConfigError
    """Class of the error to raise if memory is short: `GpuMemoryError` if the budget is what a GPU has."""

    @property
    def total(self) -> int:
        """Peak memory of the worker in bytes. Tensors count `MARGIN` times, the process itself once."""
        parts = self.parts
        apart = (parts[name] for name in ("validation", "meta", "prior"))
        worst = max(parts["trace"] + parts["block"] + parts["call"], *apart)  # these take memory at different times
        return parts["process"] + math.ceil(MARGIN * (parts["synthetic"] + parts["network"] + worst))

    def __str__(self) -> str:
        limit = "as the GPU allows" if math.isinf(self.budget) else f"of {data_size(self.budget)}"
        return f"{data_size(self.total)} {limit}"

    def lines(self) -> list[str]:
        """Lines with the parts of the worker's memory, after a heading."""
        parts = [f"    {data_size(size):>10}  {MEMORY_PARTS[name][0]}" for name, size in self.parts.items() if size]
        return [f"  memory of a worker that {self.name}, with a margin of {MARGIN - 1:.0%} on tensors:", *parts]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data. The value "limit_bytes" is `None` if this process cannot see the worker's GPU."""
        limit = None if math.isinf(self.budget) else self.budget
        return {"worker": self.name, "bytes": self.total, "limit_bytes": limit, "parts": self.parts}

    def refuse(self, *remedies: str) -> NoReturn:
        """Raise the plan's `error`: the worker needs more memory than it may take. `remedies` are named first."""
        can_help = {name: size for name, size in self.parts.items() if name != "process" or self.budget <= size}
        size, name = max((size, name) for name, size in can_help.items())
        words, knob = MEMORY_PARTS[name]
        if name == "call" and not self.demand.is_divisible:  # a block of a recovery: its images cannot be divided
            knob = "recover.block"
        found = [*remedies, f"raise --memory (cluster.memory) to {data_size(1.01 * self.total)}"]
        raise self.error(
            f"a worker that {self.name} needs {data_size(self.total)} and may take {data_size(self.budget)}",
            f"{data_size(size)} of it is {words}",
            ", or ".join([*found, f"lower {knob}"] if knob else found),
        )


def laid_out(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Copy of a run's configuration with `settings` (key -> value) in its section `cluster`; other keys stay."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=settings)})


def plans_of(config: RunConfig, shape: DataShape, sharing: int = 0) -> list[DistillationPlan]:
    """Memory plans for every backbone of a recipe, in order, then for workers that only compute MetaDD.

    Args:
        shape: shape of the recipe's data. With 0 training images, the data set counts as taking no memory.
        sharing: number of distilling workers that share a machine's memory. 0 counts the workers of this set alone,
            as if only this set were distilled, on this machine.

    Raises:
        ConfigError: a worker would need more memory than it may take, or there are more shards than classes. It is a
            `GpuMemoryError` if the worker may take what its GPU has.
    """
    require_whole_classes(config.cluster.shards, shape.classes, config.name)
    sharing = sharing or min(workers_here(config.cluster), config.workers_per_set)
    budget = worker_budget(config, shape.bytes, sharing)
    pairs = [(role, backbone) for role in config.roles for backbone in role.backbones or (None,)]
    plans = [_plan(config, shape, *pair, budget) for pair in pairs]
    for plan, pair in zip(plans, pairs, strict=True):
        if plan.total > budget:
            has_others = config.cluster.memory is None and sharing > config.workers_per_set
            remedies = ["lower cluster.workers, so that fewer sets are distilled at a time"] if has_others else []
            for shards in range(config.cluster.shards + 1, shape.classes + 1):
                if _plan(laid_out(config, {"shards": shards}), shape, *pair, budget).total <= budget:
                    remedies.append(f"use --set cluster.shards={shards}, which divides the set")
                    break
            plan.refuse(*remedies)
    return plans


def held_images(demand: Demand, config: RunConfig, shape: DataShape) -> int:
    """Number of images of the set that the largest shard holds."""
    return demand.held or shape.synthetic(config, config.cluster.shards)


def plans_of_part(part: Part, *, compiled: bool) -> Mapping[int, DistillationPlan]:
    """Memory plans of a worker, with micro-batch sizes: index of each backbone that the worker computes -> plan.

    Args:
        part: the worker's part in the distillation.
        compiled: True if student steps are compiled, which takes less memory.

    Raises:
        ConfigError: a worker of the set needs more memory than it may take.
    """
    apart = {} if part.mesh.rows > 1 else ALONE
    config = laid_out(part.config, {**apart, "shards": part.mesh.columns, "compile": compiled})
    plans = plans_of(config, DataShape(part.dataset.image_shape, part.dataset.classes, 0), part.sharing)
    return {number: plans[number] for number in part.role.backbones}


def meta_plan_of_part(part: Part) -> DistillationPlan:
    """Memory plan of a worker for MetaDD. Its `chunk` is the number of images in the MetaDD networks at a time.

    Unlike `plans_of_part`, this function raises no error if memory is short.
    """
    apart = {} if part.mesh.rows > 1 else ALONE
    config = laid_out(part.config, {**apart, "shards": part.mesh.columns})
    backbone, budget = next(iter(part.role.backbones), None), worker_budget(config, sharing=part.sharing)
    plan = _plan(config, DataShape(part.dataset.image_shape, part.dataset.classes, 0), part.role, backbone, budget)
    return replace(plan, chunk=plan.meta_chunk, parts={**plan.parts, "trace": 0, "block": 0})


def _plan(config: RunConfig, shape: DataShape, role: Role, backbone: int | None, budget: float) -> DistillationPlan:
    """Plan of a worker with this role for one of its networks, or for MetaDD alone if `backbone` is `None`."""
    shards, images, backbones = config.cluster.shards, shape.synthetic(config), config.each_backbone()
    sizes = [network_cost(each, shape) for each in backbones]
    first, size = sizes[0], sizes[backbone or 0]
    seen = [network_cost([backbones[0], *config.each_auxiliary()][number], shape) for number in role.meta_networks]
    own = method_of(config).demand(config, shape.classes, shards, size)
    vectors = own.vectors * sum(sizes[number].parameters for number in role.backbones)
    frozen = sum(each.parameters for each in seen) * (config.metadd.experts.count if config.metadd else 0)
    trained = 0 if method_of(config).pieces(config, shape.classes) else min(PROTOCOLS["short"].batch_size, images)
    validated = max(trained * first.maps, 2 * SCORING_BATCH * first.largest)  # pieces skip validation, but are labelled
    copies = SET_COPIES + (len(role.backbones) > 1) + bool(config.distill.average_decay)
    held = held_images(own, config, shape)
    parts = dict.fromkeys(MEMORY_PARTS, 0) | {
        "process": 0 if uses_gpu(config.cluster) else PROCESS_BYTES,
        "synthetic": copies * held * shape.row,
        "network": 4 * (FROZEN_VECTORS * frozen + vectors),
        "validation": validated + (images * shape.row if shards > 1 else 0),
    }
    maps = sum(each.maps for each in seen)
    of_meta = maps + IMAGE_COPIES * shape.row
    left = (budget - parts["process"]) / MARGIN - parts["synthetic"] - parts["network"]
    meta_chunk = _meta_chunk(config, maps, left / of_meta, held) if seen else 0
    parts["meta"] = meta_chunk * of_meta
    if config.prior is not None:
        decoder, latents = prior_cost(config.prior, shape.image)
        whitening = math.prod(shape.image) ** 2 * (config.dataset.kind == "zca")
        parts["synthetic"] += SET_COPIES * held * 4 * latents
        parts["network"] += 4 * (2 * decoder.parameters + whitening)  # twice, because the encoder is about as large
        parts["prior"] = min(held, micro_batch(decoder)) * (KEPT_MAPS * decoder.maps + IMAGE_COPIES * shape.row)
    error = GpuMemoryError if uses_gpu(config.cluster) and config.cluster.memory is None else ConfigError
    if backbone is None:
        name = f"holds metadd.auxiliaries.{role.meta_networks[0] - 1} of {config.name}"
        return DistillationPlan(name, budget, parts, 0, own, meta_chunk, error)
    of_an_image = own.maps * size.maps + IMAGE_COPIES * shape.row
    block = block_bytes(own.at_once, own.steps, 4 * math.prod(shape.image)) if uses_gpu(config.cluster) else 0
    free = (budget - parts["process"]) / MARGIN - parts["synthetic"] - parts["network"] - own.trace - block
    chunk = _micro_batch(config, own, free / of_an_image, size.largest)
    parts |= {"trace": own.trace, "block": block, "call": chunk * of_an_image}
    name = f"distils {config.name}" + (f", backbone {backbone}" if config.backbones else "")
    return DistillationPlan(name, budget, parts, chunk, own, meta_chunk, error)


def _micro_batch(config: RunConfig, demand: Demand, most: float, largest: int) -> int:
    """Number of images in a micro-batch, at least 1, so that all micro-batches of a step are nearly equal.

    If the images must not be divided, it is the number of all images of the step, even above `most`. On CPUs it is also
    limited so that feature maps fit the cache.

    Args:
        most: largest number of images that memory allows.
        largest: bytes of one image's largest feature map.
    """
    if not demand.is_divisible:
        return demand.at_once
    most = min(most, demand.at_once)
    if not uses_gpu(config.cluster):
        most = min(most, 2 * CACHED_MAP_BYTES // (demand.maps * largest))  # a compiled step writes maps twice
    return even_size(demand.at_once, max(1, int(most)))


def _meta_chunk(config: RunConfig, maps: int, most: float, held: int) -> int:
    """Number of images in MetaDD's networks at a time, at least 1, so that all micro-batches are nearly equal.

    Args:
        maps: bytes that all layers of the worker's MetaDD networks write for one image.
        most: largest number of images that memory allows.
        held: number of the set's images that the worker holds.
    """
    assert config.metadd is not None
    images = max(1, math.ceil(config.metadd.share * held))
    if not uses_gpu(config.cluster):
        most = min(most, max(META_IMAGES[0], min(META_IMAGES[1], META_BYTES // maps)))
    return even_size(images, max(1, int(min(most, images))))


def require_whole_classes(shards: int, classes: int, name: str) -> None:
    """Raise a `ConfigError` if there are more shards than classes. `name` is the run's, for the message."""
    if shards > classes:
        raise ConfigError(
            f"cluster.shards is {shards}, but {name} has {classes} classes",
            "a shard holds whole classes",
            f"use --set cluster.shards={classes} or fewer",
        )


def worker_budget(config: RunConfig, data_bytes: int = 0, sharing: int = 1) -> float:
    """Bytes that one distilling worker may take: `cluster.memory`, or what its device has free for it.

    On a GPU that workers share, the result is at most the worker's part of the GPU's memory, less what the worker's
    CUDA context and its present tensors take. The result is infinite if this process cannot see the GPU.

    A process that does not compute on its GPU, such as the driver of Ray's workers, does not start CUDA for this. It
    counts the GPU's whole memory as free, and the workers count again.

    Args:
        data_bytes: size of the data set; the workers of a machine share one copy.
        sharing: number of workers that share the machine's main memory.
    """
    cluster = config.cluster
    if cluster.memory_bytes is not None:
        return cluster.memory_bytes
    if not uses_gpu(cluster):
        return max(0, available_memory() - data_bytes) // sharing
    if not torch.cuda.is_available():
        return math.inf
    # Other workers may have taken their parts of the GPU already, so a part of the free memory would be too little.
    part = cluster.gpus_per_worker or 1.0
    context = CONTEXT_BYTES if part < 1 else 0
    if not torch.cuda.is_initialized():
        size = gpu_size()
        return math.inf if size is None else int(GPU_SHARE * max(0, part * size - context))
    share = part * torch.cuda.mem_get_info()[1] - context - torch.cuda.memory_allocated()
    return int(GPU_SHARE * max(0, min(free_gpu_memory(), share)))


@contextmanager
def crowded_gpus_lose(cluster: ClusterConfig) -> Iterator[None]:
    """Context in which a `GpuMemoryError` becomes a `WorkerLostError` if other processes hold this worker's GPU memory.

    The other processes may end, such as a killed worker that the driver has not released yet. So another attempt may
    succeed.
    """
    try:
        yield
    except GpuMemoryError as failure:
        free, total = torch.cuda.mem_get_info()
        if free + torch.cuda.memory_reserved() >= GPU_SHARE * (cluster.gpus_per_worker or 1.0) * total:
            raise
        raise WorkerLostError(failure.fact, "other processes hold memory of its GPU", failure.remedy) from None


def chunk_by_trial(
    step: Callable[[int], None],
    plan: DistillationPlan,
    device: torch.device,
    forget: Callable[[], None] = lambda: None,
) -> int:
    """Number of images of the largest micro-batch whose step fits on a GPU.

    Tries the number in the plan, then half of it, down to one image.

    A trial also allocates the plan's parts "trace" and "block", the bytes that stay in memory through an iteration and
    through several steps. A step fits if the trial's peak memory stays within the plan's budget.

    Args:
        step: computes one step with the given number of images.
        plan: plan of the worker, with its budget and the largest micro-batch to try.
        device: the GPU.
        forget: function that frees what a failed trial has left, such as recorded CUDA graphs with their memory.

    Raises:
        ConfigError: a step of one image takes more than the budget, which the recipe gives.
        GpuMemoryError: the budget is what the GPU has, or the GPU has less.
    """
    limit, chunk = torch.cuda.memory_allocated(device) + plan.budget, plan.chunk
    held, peak = plan.parts["trace"] + plan.parts["block"], None
    while chunk:
        torch.cuda.empty_cache()
        for _ in range(1 + torch.backends.cudnn.benchmark):  # timing cuDNN's algorithms may take more memory, once
            peak = _peak(partial(step, chunk), held, device)
            if peak is not None and peak <= limit:
                return chunk
            forget()  # a graph that is only replayed would show less memory than its recording took
        chunk //= 2
    error = GpuMemoryError if peak is None else plan.error
    raise error(
        f"a worker that {plan.name} has too little GPU memory for a step of one image",
        f"it may take {'all of it' if math.isinf(plan.budget) else data_size(plan.budget)}",
        "raise --memory, or cluster.gpus_per_worker if it is below 1, use more cluster.shards, or lower "
        "distill.student_steps or network.width",
    )


def _peak(step: Callable[[], None], held: int, device: torch.device) -> int | None:
    """The GPU's peak memory in bytes in a step beside `held` bytes; `None` if the GPU has too little."""
    torch.cuda.reset_peak_memory_stats(device)
    try:
        beside = torch.empty(held, dtype=torch.uint8, device=device)
        step()
        del beside
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device)
