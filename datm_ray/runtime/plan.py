"""What a distillation will take, told before it starts: memory of a worker, size of its micro-batches, work, traffic.

Everything follows from the recipe and the shape of an image; no data set, no GPU and no memory for activations is
needed. A recipe that does not fit is refused with the option that makes it fit.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from datm_ray.config import DatasetConfig, RunConfig
from datm_ray.core.footprint import CACHE_BYTES, CallCost, Footprint, call_cost, choose_chunk, footprint, scoring_bytes
from datm_ray.core.instance_norm import InstanceNorm
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork
from datm_ray.core.step_functions import Order, Precision, StepOptions, StudentStepFunctions
from datm_ray.core.training import PROTOCOLS, predict_logits
from datm_ray.data.sources import load_raw
from datm_ray.errors import ConfigError
from datm_ray.runtime.experts import network_spec

PROCESS_BYTES = 900 * 2**20
"""A worker without its tensors. Measured after importing torch and compiling both functions: 780 to 855 MiB resident,
of which 530 MiB are there after the import."""

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class DataShape:
    """All that planning needs to know of a data set."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    training_images: int
    """With those set aside for validation, or about so many."""


KNOWN_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1438),
    "cifar10": DataShape((3, 32, 32), 10, 50_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000),
    "tiny-imagenet": DataShape((3, 64, 64), 200, 100_000),
}
"""Sources whose shape is known without their files."""


@dataclass(frozen=True)
class DistillationPlan:
    """What distilling one recipe takes."""

    name: str
    shards: int
    images: int
    """Of the whole synthetic set."""
    steps: int
    batch: int
    """Images of a student step over all shards."""
    chunk: int
    """Images of a micro-batch."""
    footprint: Footprint
    """Of one worker."""
    budget: int | None
    """Bytes that one worker may take; none where the workers' GPUs cannot be seen from here."""
    data_bytes: int
    """Training images as float32, one copy shared by the workers of a machine and so not part of the footprint."""
    flop: int
    """Of one iteration, over all shards."""
    network_bytes: int
    """That each shard sums with the others in one iteration."""
    store_bytes: int
    """Of the expert trajectories."""

    def lines(self) -> list[str]:
        """The plan as text for people."""
        parts = self.footprint
        shares = f" on each of {self.shards} shards" if self.shards > 1 else ""
        limit = "as the GPU allows" if self.budget is None else f"of {show_bytes(self.budget)}"
        rows = [
            ("images", f"{self.images:,}"),
            ("student steps", f"{self.steps:,} of {self.batch:,} images"),
            ("micro-batch", f"{self.chunk:,} images"),
            ("process", show_bytes(parts.process)),
            ("synthetic set", show_bytes(parts.synthetic)),
            ("network", show_bytes(parts.network)),
            ("trace", show_bytes(parts.trace)),
            ("one micro-batch", show_bytes(parts.call)),
            ("or validation", f"{show_bytes(parts.scoring)}, in place of the two"),
            ("total", f"{show_bytes(parts.total)} {limit}"),
            ("training images", f"{show_bytes(self.data_bytes)}, shared by the workers of a machine"),
            ("work", f"{self.flop / 1e12:,.3g} TFLOP an iteration"),
            ("network traffic", f"{show_bytes(self.network_bytes)} summed an iteration{shares}"),
            ("expert store", show_bytes(self.store_bytes)),
        ]
        return [self.name, *(f"  {label:<16} {value}" for label, value in rows)]


def data_shape(dataset: DatasetConfig) -> DataShape:
    """The shape of a recipe's data; files are read only where the source does not tell it.

    Raises:
        DatasetError: a folder or file of images that cannot be read.
    """
    if dataset.source not in KNOWN_SHAPES:
        raw = load_raw(dataset.source, dataset.path, resize=dataset.resize, validation=dataset.validation)
        return DataShape((raw.channels, *raw.size), raw.classes, len(raw.train) + len(raw.validation))
    shape = KNOWN_SHAPES[dataset.source]
    if dataset.resize is None:
        return shape
    return DataShape((shape.image[0], dataset.resize, dataset.resize), shape.classes, shape.training_images)


def distillation_plan(
    config: RunConfig,
    image: tuple[int, int, int],
    classes: int,
    *,
    shards: int | None = None,
    training_images: int = 0,
    sharing: int | None = None,
) -> DistillationPlan:
    """Plan one recipe; takes seconds and no memory worth mentioning.

    Args:
        image: channels, height, width.
        shards: workers that share the set, where they are not as many as the recipe asks for.
        training_images: of the data set, where its size is to count.
        sharing: distilling workers at a time on this machine; none takes those of this recipe alone.

    Raises:
        ConfigError: a worker would need more memory than it may take.
    """
    settings, shards = config.distill, shards or config.cluster.shards
    require_whole_classes(shards, classes, config.name)
    spec = network_spec(config, image[0], image[1:], classes)
    parameters = FlatNetwork(build_network(spec, seed=0)).count
    data_bytes = 4 * training_images * image[0] * image[1] * image[2]
    on_gpu = _uses_gpu(config)
    budget = worker_budget(config, data_bytes, sharing)
    images, batch = settings.ipc * classes, min(settings.batch_size, settings.ipc * classes)
    cost = _cost(spec, config.cluster.compile, config.cluster.precision)
    parts = {
        "parameters": parameters,
        "steps": settings.student_steps,
        "images": settings.ipc * -(-classes // shards),
        "process": 0 if on_gpu else PROCESS_BYTES,
        "scoring": _scoring(spec, images),
    }
    rest = _footprint(parts, image, classes, cost, chunk=0)
    left = float("inf") if budget is None else budget - rest.process - rest.synthetic - rest.network - rest.trace
    chunk = choose_chunk(
        cost, image, classes, rows_at_a_time(images, parts["images"], batch), left, None if on_gpu else CACHE_BYTES
    )
    plan = DistillationPlan(
        name=config.name,
        shards=shards,
        images=images,
        steps=settings.student_steps,
        batch=batch,
        chunk=chunk or 1,
        footprint=_footprint(parts, image, classes, cost, chunk=chunk or 1),
        budget=budget,
        data_bytes=data_bytes,
        flop=settings.student_steps * batch * (cost.forward_flop + cost.reverse_flop),
        network_bytes=4 * settings.student_steps * (2 * parameters + 1) if shards > 1 else 0,
        store_bytes=4 * config.experts.count * (config.experts.epochs + 1) * parameters,
    )
    _require_fits(plan)
    return plan


def rows_at_a_time(images: int, held: int, batch: int) -> int:
    """Images of a minibatch that a shard which holds so many of all images must be ready for: all but one in a
    thousand minibatches have no more.

    A minibatch is drawn without regard to shards, so a shard's part varies. Were a micro-batch sized for the average,
    half of all steps would need a second one for the few images left.
    """
    share = held / images
    spread = math.sqrt(batch * share * (1 - share) * (images - batch) / max(1, images - 1))
    return min(held, batch, math.ceil(batch * share + 3 * spread))


def require_whole_classes(shards: int, classes: int, name: str) -> None:
    """Raise a `ConfigError` if there are more shards than classes."""
    if shards > classes:
        raise ConfigError(
            f"cluster.shards is {shards}, but {name} has {classes} classes",
            "a shard holds whole classes",
            f"use --set cluster.shards={classes} or fewer",
        )


def worker_budget(config: RunConfig, data_bytes: int = 0, sharing: int | None = None) -> int | None:
    """Bytes that one distilling worker may take: what the recipe says, or else what its device has free.

    Args:
        data_bytes: of the data set that the workers of a machine share.
        sharing: workers that share the machine, or else this recipe's.
    """
    cluster = config.cluster
    if cluster.memory_bytes is not None:
        return cluster.memory_bytes
    if _uses_gpu(config):
        if not torch.cuda.is_available():
            return None
        share = cluster.gpus_per_worker if 0 < cluster.gpus_per_worker < 1 else 1.0
        return int(torch.cuda.mem_get_info()[0] * share)
    at_a_time = cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
    return max(0, available_memory() - data_bytes) // min(at_a_time, sharing or cluster.shards)


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of main memory that can be taken without swapping."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    # No Linux: all there is, for what is in use is not told in a way that all systems share.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def show_bytes(size: float) -> str:
    """A size for people, in MiB or GiB."""
    if size >= _GIB:
        return f"{size / _GIB:,.2f} GiB"
    return f"{size / _MIB:,.1f} MiB"


def _uses_gpu(config: RunConfig) -> bool:
    cluster = config.cluster
    return cluster.device != "cpu" and (
        torch.cuda.is_available() or cluster.device == "cuda" or cluster.gpus_per_worker > 0
    )


@functools.lru_cache(maxsize=16)
def _cost(spec: NetworkSpec, compiled: bool, precision: Precision) -> CallCost:
    """Of the worker's functions; no compiler is tried out here."""
    order: Order = "reverse-over-forward" if compiled else "reverse-over-reverse"
    options = StepOptions(compiled=False, order=order, precision=precision)
    functions = StudentStepFunctions(FlatNetwork(build_network(spec, seed=0)), options)
    for part in functions.network.module.modules():
        if isinstance(part, InstanceNorm):
            part.explicit = compiled
    return call_cost(functions, (spec.channels, *spec.size), spec.classes, compiled=compiled)


@functools.lru_cache(maxsize=16)
def _scoring(spec: NetworkSpec, images: int) -> int:
    scored = int(inspect.signature(predict_logits).parameters["batch_size"].default)
    trained = min(PROTOCOLS["short"].batch_size, images)
    network = FlatNetwork(build_network(spec, seed=0))
    return scoring_bytes(network, (spec.channels, *spec.size), spec.classes, trained, scored)


def _footprint(
    parts: dict[str, int], image: tuple[int, int, int], classes: int, cost: CallCost, *, chunk: int
) -> Footprint:
    return footprint(**parts, image=image, classes=classes, call=cost.bytes(chunk), chunk=chunk)


RAISE = "raise --memory (cluster.memory)"
REMEDIES = {
    "process": ("the process itself", f"{RAISE}, or lower cluster.workers"),
    "synthetic": (
        "its share of the synthetic set",
        f"raise cluster.shards, which divides the set, or {RAISE}, or lower distill.ipc",
    ),
    "network": ("the network", f"{RAISE}, or lower network.width"),
    "trace": ("the trace of the student's steps", f"lower distill.student_steps, or {RAISE}"),
    "call": ("the smallest micro-batch", f"{RAISE}, or lower network.width or dataset.resize"),
    "scoring": ("validation", f"{RAISE}, or lower network.width or dataset.resize"),
}
"""The part that takes most in words, and what to do about it."""


def _require_fits(plan: DistillationPlan) -> None:
    parts = plan.footprint
    if plan.budget is None or parts.total <= plan.budget:
        return
    largest = parts.largest_part
    words, remedy = REMEDIES[largest]
    raise ConfigError(
        f"a worker that distils {plan.name} needs {show_bytes(parts.total)} and may take {show_bytes(plan.budget)}",
        f"most of it, {show_bytes(getattr(parts, largest))}, is {words}",
        remedy,
    )
