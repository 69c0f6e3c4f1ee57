"""Memory of workers that distil. A set that does not fit is refused before anything starts.

The set, parameters and images are counted exactly, activations as a multiple of what all layers write in one forward
pass (`core/networks/image_cost.py`), measured on CPUs. On a GPU a trial step decides in the end (`chunk_by_trial`).
Accuracy: benchmarks/README.md. Tests: tests/planning/test_fit.py.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from datm_ray.config import Role, RunConfig
from datm_ray.core.metadd import IMAGES_AT_A_TIME
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES
from datm_ray.core.training import PROTOCOLS, SCORING_BATCH
from datm_ray.errors import ConfigError
from datm_ray.memory import available_memory
from datm_ray.planning.shape import DataShape, network_cost
from datm_ray.runtime.devices import free_gpu_memory, uses_gpu
from datm_ray.stages.registry import method_of
from datm_ray.store.trajectories import size_in_words

if TYPE_CHECKING:
    from datm_ray.stages.method import Demand

PROCESS_BYTES = 1200 * 2**20
"""Memory of a CPU worker without its tensors. Measured: 935 to 980 MiB if a worker only distilled, 1,050 to 1,200
MiB if it had trained networks before."""
MARGIN = 1.25
"""Factor on all counted tensors, for allocators and workspaces."""
SET_COPIES = 5
"""Copies of images and labels: the set, its momentum, its gradient, the updated set, the set kept by validation."""
IMAGE_COPIES = 6
"""Copies of a micro-batch's images: raw, augmented, kept for the derivative, and gradients."""
FROZEN_VECTORS = 2
"""Number of parameter vectors in memory for each MetaDD network: the restored network and its frozen copy."""
GPU_SHARE = 0.9
"""Share of a GPU's free memory that a worker may fill."""

PARTS = {
    "process": ("the process itself", ""),
    "synthetic": ("its share of the synthetic set", "distill.ipc"),
    "network": ("the network and sums of its gradients", "network.width"),
    "trace": ("the trace of the student's steps", "distill.student_steps"),
    "call": ("one micro-batch", "network.width or dataset.resize"),
    "validation": ("validation", "network.width or dataset.resize"),
    "meta": ("the networks of metadd", "dataset.resize, or choose smaller metadd.auxiliaries"),
}
"""Part of a worker's memory -> what it is, and which setting makes it smaller; "" if none does."""


@dataclass(frozen=True)
class Layout:
    """Workers that distil a set together."""

    shards: int
    roles: tuple[Role, ...]
    """Role of each row of workers; empty if there is one row."""
    sharing: int
    """Number of distilling workers that run on one machine at the same time."""

    @classmethod
    def of(cls, config: RunConfig, workers_of_all_sets: int = 0, workers_here: int | None = None) -> Layout:
        """Layout that the recipe itself asks for.

        Args:
            workers_of_all_sets: number of workers that all sets want at the same time; 0 for this set's number.
            workers_here: number of workers that fit on a machine; `None` takes `cluster.workers`, or this machine's
                CPUs if it is null.
        """
        cluster = config.cluster
        room = workers_here or cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
        return cls(cluster.shards, config.roles, min(room, workers_of_all_sets or config.workers_per_set))


ALONE = Layout(1, (), 1)
"""One worker that has the machine to itself."""


@dataclass(frozen=True)
class DistillationPlan:
    """Memory plan of one worker and one network that it distils with, or of a worker that only computes MetaDD."""

    name: str
    """Phrase that says what the worker does, for messages."""
    budget: float
    """Bytes that the worker may take; infinite if this process cannot see its GPU."""
    parts: Mapping[str, int]
    """Bytes that the worker takes, by part, see `PARTS`."""
    chunk: int = 0
    """Images of a micro-batch: as many as the budget and a CPU's cache allow, in even parts, and at least 1."""
    demand: Demand | None = None
    """Work and memory of an iteration of the method; `None` for a worker that only computes MetaDD."""

    @property
    def passes(self) -> Mapping[str, float]:
        """Work of an iteration: kind of work -> images that pass through the network, with padded micro-batches."""
        if self.demand is None:
            return {}
        rows = self.demand.at_once
        padded = -(-rows // self.chunk) * self.chunk
        return {kind: count / rows * padded for kind, count in self.demand.passes.items()}

    @property
    def total(self) -> int:
        """Peak memory of the worker in bytes, with `MARGIN` on everything but the process."""
        parts = self.parts
        worst = max(parts["trace"] + parts["call"], parts["validation"], parts["meta"])  # never at the same time
        return parts["process"] + math.ceil(MARGIN * (parts["synthetic"] + parts["network"] + worst))

    @property
    def memory(self) -> str:
        """Memory that the worker takes, and its limit, in words."""
        limit = "as the GPU allows" if math.isinf(self.budget) else f"of {size_in_words(self.budget)}"
        return f"{size_in_words(self.total)} {limit}"

    def lines(self) -> list[str]:
        """Lines with the parts of the worker's memory, after a heading."""
        parts = [f"    {size_in_words(size):>10}  {PARTS[name][0]}" for name, size in self.parts.items() if size]
        return [f"  memory of a worker that {self.name}, with a margin of {MARGIN - 1:.0%} on tensors:", *parts]


def plans_of(config: RunConfig, shape: DataShape, layout: Layout | None = None) -> list[DistillationPlan]:
    """Plans of every network that a recipe works on, in the networks' order, then of workers that only compute MetaDD.

    Args:
        shape: the recipe's data. With 0 training images, the data set does not count in a machine's memory.
        layout: workers that distil the set; `None` takes the recipe's own layout.

    Raises:
        ConfigError: a worker would need more memory than it may take, or there are more shards than classes.
    """
    layout = layout or Layout.of(config)
    require_whole_classes(layout.shards, shape.classes, config.name)
    budget, roles = worker_budget(config, shape.bytes, layout.sharing), layout.roles or (config.whole_role,)
    others = config.cluster.memory is None and layout.sharing > layout.shards * len(roles)
    matched = sorted((number, role) for role in roles for number in role.backbones)
    plans = []
    for number, role in [*matched, *((None, role) for role in roles if not role.backbones)]:
        own = functools.partial(_plan, config, shape, role, number, budget)
        plans.append(own(layout.shards))
        if plans[-1].total > budget:
            enough = (n for n in range(layout.shards + 1, shape.classes + 1) if own(n).total <= budget)
            remedies = ["lower cluster.workers, so that fewer sets are distilled at a time"] if others else []
            remedies += [f"use --set cluster.shards={n}, which divides the set" for n in islice(enough, 1)]
            raise _unfit(plans[-1], remedies)
    return plans


def _plan(
    config: RunConfig, shape: DataShape, role: Role, backbone: int | None, budget: float, shards: int
) -> DistillationPlan:
    """Plan of a worker with this role for one of its networks, or `None` for MetaDD, in a set of `shards` shards."""
    cost, images = network_cost(config, shape), shape.synthetic(config)
    sizes = [network_cost(each, shape) for each in config.each_backbone()]
    size = sizes[backbone or 0]
    own = method_of(config).demand(config, shape.classes, shards, size)
    held = own.held or shape.synthetic(config, shards)
    networks = [*config.each_backbone()[:1], *config.each_auxiliary()]
    seen = [network_cost(networks[number], shape) for number in role.meta_networks]
    frozen = sum(each.parameters for each in seen) * (config.metadd.experts.count if config.metadd else 0)
    trained = min(PROTOCOLS["short"].batch_size, images) * cost.maps
    parts = dict.fromkeys(PARTS, 0) | {
        "process": 0 if uses_gpu(config.cluster) else PROCESS_BYTES,
        "synthetic": (SET_COPIES + (len(role.backbones) > 1)) * held * shape.row,
        "network": 4 * FROZEN_VECTORS * frozen,
        "validation": max(trained, 2 * SCORING_BATCH * cost.largest) + (images * shape.row if shards > 1 else 0),
        "meta": sum(IMAGES_AT_A_TIME * each.maps for each in seen),
    }
    if backbone is None:
        name = f"holds metadd.auxiliaries.{role.meta_networks[0] - 1} of {config.name}"
        return DistillationPlan(name, budget, parts)
    parts["network"] += 4 * own.vectors * sum(sizes[number].parameters for number in role.backbones)
    parts["trace"], of_an_image = own.trace, own.maps * size.maps + IMAGE_COPIES * shape.row
    free = (budget - parts["process"]) / MARGIN - parts["synthetic"] - parts["network"] - parts["trace"]
    most = min(own.at_once, free / of_an_image)
    if not uses_gpu(config.cluster):
        most = min(most, 2 * CACHED_MAP_BYTES // (own.maps * size.largest))  # a compiled step writes maps twice
    most = most if own.is_divisible else own.at_once
    chunk = math.ceil(own.at_once / math.ceil(own.at_once / max(1, int(most))))
    parts["call"] = chunk * of_an_image
    name = f"distils {config.name}" + (f", backbone {backbone}" if config.backbones else "")
    return DistillationPlan(name, budget, parts, chunk, own)


def _unfit(plan: DistillationPlan, remedies: list[str]) -> ConfigError:
    """Error about a worker that needs more memory than it may take. Its remedies begin with `remedies`."""
    can_help = {name: size for name, size in plan.parts.items() if name != "process" or plan.budget <= size}
    largest = max(can_help, key=lambda name: can_help[name])
    words, knob = PARTS[largest]
    found = [*remedies, f"raise --memory (cluster.memory) to {size_in_words(1.01 * plan.total)}"]
    return ConfigError(
        f"a worker that {plan.name} needs {size_in_words(plan.total)} and may take {size_in_words(plan.budget)}",
        f"{size_in_words(can_help[largest])} of it is {words}",
        ", or ".join([*found, *([f"lower {knob}"] if knob else [])]),
    )


def require_whole_classes(shards: int, classes: int, name: str) -> None:
    """Raise a `ConfigError` if there are more shards than classes."""
    if shards > classes:
        raise ConfigError(
            f"cluster.shards is {shards}, but {name} has {classes} classes",
            "a shard holds whole classes",
            f"use --set cluster.shards={classes} or fewer",
        )


def worker_budget(config: RunConfig, data_bytes: int = 0, sharing: int = 1) -> float:
    """Bytes that one distilling worker may take: `cluster.memory`, or what its device has free.

    Infinite for GPUs that this process cannot see.

    Args:
        data_bytes: bytes of the data set that the workers of a machine share.
        sharing: workers that share the machine.
    """
    cluster = config.cluster
    if cluster.memory_bytes is not None:
        return cluster.memory_bytes
    if not uses_gpu(cluster):
        return max(0, available_memory() - data_bytes) // sharing
    if not torch.cuda.is_available():
        return math.inf
    return int(GPU_SHARE * min(cluster.gpus_per_worker or 1.0, 1.0) * free_gpu_memory())


def chunk_by_trial(step: Callable[[int], None], plan: DistillationPlan, device: torch.device) -> int:
    """Largest micro-batch whose step fits on a GPU. Tries the plan's size, then half of it, down to one image.

    Args:
        step: computes one step of a number of images. The trial holds the plan's trace beside it, within the budget.

    Raises:
        ConfigError: a step of one image does not fit.
    """
    limit, chunk = torch.cuda.memory_allocated(device) + plan.budget, plan.chunk
    while chunk:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            trace = torch.empty(plan.parts["trace"], dtype=torch.uint8, device=device)
            step(chunk)
            del trace
            if torch.cuda.max_memory_allocated(device) <= limit:
                return chunk
        except torch.OutOfMemoryError:
            trace = None
        chunk //= 2
    raise ConfigError(
        f"a worker that {plan.name} has too little GPU memory for a step of one image",
        f"it may take {'all of it' if math.isinf(plan.budget) else size_in_words(plan.budget)}",
        "raise cluster.gpus_per_worker or --memory, use more cluster.shards, or lower distill.student_steps or "
        "network.width",
    )
