"""Will a distillation fit into memory, and how large may its micro-batches be? Estimated before it starts.

The synthetic set, parameters and training images are counted exactly. Activations are a multiple of what all layers
write in one forward pass (`core/networks/image_cost.py`), measured on CPUs. On a GPU a trial step has the last word
(`chunk_by_trial`). Accuracy: benchmarks/README.md. Tests: tests/planning/test_fit.py.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from datm_ray.config import DatasetConfig, NetworkSpec, Role, RunConfig
from datm_ray.core.metadd import IMAGES_AT_A_TIME
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES
from datm_ray.core.training import PROTOCOLS, SCORING_BATCH
from datm_ray.data.decode import require_memory
from datm_ray.data.sources import load_raw
from datm_ray.data.transform import FitCost
from datm_ray.errors import ConfigError
from datm_ray.memory import available_memory
from datm_ray.runtime.devices import uses_gpu
from datm_ray.store.trajectories import size_in_words

PROCESS_BYTES = 1200 * 2**20
"""Memory of a CPU worker without its tensors. Measured: 935 to 980 MiB where a worker only distilled, 1,050 to 1,200
where it had trained networks before."""
MARGIN = 1.25
"""Factor on all counted tensors, for allocators and workspaces."""
COMPILED_MAPS, UNCOMPILED_MAPS = 2, 9
"""Peak memory of a student step, as a multiple of the bytes that all layers write in one forward pass. Measured: 1.8 to
1.9 compiled, 7.3 to 8.9 without."""
SET_COPIES = 5
"""Copies of images and labels: the set, its momentum, its gradient, the updated set, the set kept by validation."""
NETWORK_VECTORS = 8
"""Vectors of p numbers beside the trace: two networks, target, v, and sums of gradients."""
FROZEN_VECTORS = 2
"""Vectors of p numbers of each MetaDD network: as it was restored, and its frozen copy."""
IMAGE_COPIES = 6
"""Copies of a micro-batch's images: raw, augmented, kept for the derivative, and gradients."""
GPU_SHARE = 0.9
"""Share of a GPU's free memory that a worker may fill."""


@dataclass(frozen=True)
class DataShape:
    """All that planning needs to know of a data set."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    training_images: int
    """Number of training images, those set aside for validation included."""
    test_images: int = 0
    """Number of test images; 0 where it is not known, and then scoring them is not counted."""

    @property
    def bytes(self) -> int:
        """Bytes of the training images as float32. Workers on one node share one copy."""
        return 4 * self.training_images * math.prod(self.image)


KNOWN_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1438, 359),
    "cifar10": DataShape((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000, 10_000),
    "tiny-imagenet": DataShape((3, 64, 64), 200, 100_000, 10_000),
}
"""Sources whose shape is known without their files."""


def parse_shape(text: str) -> DataShape:
    """Read a data set's shape: channels x height x width, classes, training images, such as `3x64x64,200,100000`.

    Raises:
        ConfigError: the text has another form, or the numbers cannot be those of a data set.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+),(\d+),(\d+)", text.strip()[:99], re.ASCII)
    numbers = [int(number) for number in match.groups()] if match else [0]
    *sides, classes, images = numbers if min(numbers) else (1, 1, 1, 1, 0)
    if max(sides) > 2**14 or classes > 10**6 or not classes <= images <= 10**10:
        possible = "larger than any data set, or has fewer images than classes" if images else "no shape of a data set"
        raise ConfigError(
            f"--data-shape {text!r} is {possible}",
            remedy="write channels x height x width, classes, training images, as 3x64x64,1000,1281167",
        )
    return DataShape((sides[0], sides[1], sides[2]), classes, images)


def data_shape(dataset: DatasetConfig, *, here: bool = False) -> DataShape:
    """Shape of a recipe's data; files are read only where the source does not tell it.

    Args:
        dataset: the source, and the size to which its images are resized.
        here: whether the run will be on this machine, where resized images must fit into memory.

    Raises:
        DatasetError: images cannot be read, or do not fit into memory.
    """
    if dataset.source not in KNOWN_SHAPES:
        raw = load_raw(dataset.source, dataset.path, resize=dataset.resize, validation=dataset.validation, copies=2)
        images = len(raw.train) + len(raw.validation)
        return DataShape((raw.channels, *raw.size), raw.classes, images, len(raw.test))
    shape = KNOWN_SHAPES[dataset.source]
    if dataset.resize is None:
        return shape
    image = (shape.image[0], dataset.resize, dataset.resize)
    if here:
        require_memory(shape.training_images, image, copies=2)
    return replace(shape, image=image)


def fitting_cost(dataset: DatasetConfig, shape: DataShape) -> FitCost:
    """Cost of fitting the normalisation on the training images that are left beside those for validation."""
    left = round(shape.training_images * (1 - dataset.validation))
    return FitCost.of(dataset.resolved(shape.image[1:]).kind, shape.image, left)


@dataclass(frozen=True)
class Layout:
    """Workers that distil a set together."""

    shards: int
    roles: tuple[Role, ...]
    """Roles of the rows of workers; empty where one row does everything."""
    sharing: int
    """Distilling workers that one machine has at a time."""

    @classmethod
    def of(cls, config: RunConfig, workers_of_all_sets: int = 0, workers_here: int | None = None) -> Layout:
        """The recipe's own layout.

        Args:
            config: the recipe.
            workers_of_all_sets: workers wanted at the same time; 0 stands for this set's.
            workers_here: workers for which a machine has room; None takes this machine's CPUs.
        """
        cluster = config.cluster
        room = workers_here or cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
        sharing = min(room, workers_of_all_sets or config.workers_per_set)
        return cls(cluster.shards, config.roles, sharing)


ALONE = Layout(1, (), 1)
"""One worker that has the machine to itself."""

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
PHASES = (("trace", "call"), ("validation",), ("meta",))
"""Parts that are there at the same time; the others are there always."""
Parts = dict[str, int]
"""Bytes that one distilling worker takes; keys as in `PARTS`."""


def at_worst(parts: Parts) -> Parts:
    """Parts that are there when most memory is taken."""
    phase = max(PHASES, key=lambda names: sum(parts[name] for name in names))
    return {name: parts[name] for name in ("process", "synthetic", "network", *phase)}


def total(parts: Parts) -> int:
    """Bytes when most memory is taken, with `MARGIN` on all but the process."""
    return parts["process"] + math.ceil(MARGIN * (sum(at_worst(parts).values()) - parts["process"]))


@dataclass(frozen=True)
class DistillationPlan:
    """Memory and micro-batch of a worker that matches one network of a recipe, or none."""

    config: RunConfig
    shape: DataShape
    role: Role
    """Networks that the worker holds."""
    backbone: int | None
    """Number of the network that it matches now; None for a worker that only computes MetaDD."""
    shards: int
    budget: int | None
    """Bytes that the worker may take; None where its GPU cannot be seen from here."""

    @property
    def name(self) -> str:
        """Phrase that says what the worker does, for messages."""
        if self.backbone is None:
            return f"holds metadd.auxiliaries.{self.role.meta_networks[0] - 1} of {self.config.name}"
        return f"distils {self.config.name}" + (f", backbone {self.backbone}" if self.config.backbones else "")

    @property
    def images(self) -> int:
        """Images of the whole synthetic set."""
        return self.config.distill.ipc * self.shape.classes

    @property
    def batch(self) -> int:
        """Images of a student step, over all shards."""
        return min(self.config.distill.batch_size, self.images)

    @property
    def rows(self) -> int:
        """Images of a student step on one shard, see `rows_at_a_time`."""
        return rows_at_a_time(self.images, self._held(self.shards), self.batch)

    @property
    def network_bytes(self) -> int:
        """Bytes that a shard sums with the others in one iteration; 0 with one shard."""
        return 4 * self.config.distill.student_steps * (2 * self._parameters + 1) if self.shards > 1 else 0

    @functools.cached_property
    def chunk(self) -> int:
        """Images of a micro-batch: as many as the budget and a CPU's cache allow, in even parts; at least 1."""
        most = self.rows
        if not uses_gpu(self.config.cluster):
            cached = COMPILED_MAPS * CACHED_MAP_BYTES // (self._maps * self._cost(self.backbone or 0).largest)
            most = min(most, cached)
        if self.budget is not None:
            rest = self.parts_with(self.shards, 0)
            left = (self.budget - rest["process"]) / MARGIN - rest["synthetic"] - rest["network"] - rest["trace"]
            most = min(most, int(left // self._bytes_of_an_image))
        return math.ceil(self.rows / math.ceil(self.rows / max(1, most)))

    @functools.cached_property
    def parts(self) -> Parts:
        """Bytes that the worker takes, by part."""
        return self.parts_with(self.shards, self.chunk)

    def parts_with(self, shards: int, chunk: int) -> Parts:
        """Bytes with so many shards and micro-batches of so many images."""
        config, row = self.config, self._row
        looking = [*config.each_backbone()[:1], *config.each_auxiliary()]
        seen = [network_cost(looking[place], self.shape) for place in self.role.meta_networks]
        matched = sum(self._cost(number).parameters for number in self.role.backbones)
        frozen = sum(each.parameters for each in seen) * (config.metadd.experts.count if config.metadd else 0)
        trained = min(PROTOCOLS["short"].batch_size, self.images) * self._cost(0).maps
        gathered = self.images * row if shards > 1 else 0
        return {
            "process": 0 if uses_gpu(config.cluster) else PROCESS_BYTES,
            "synthetic": (SET_COPIES + (len(self.role.backbones) > 1)) * self._held(shards) * row,
            "network": 4 * (NETWORK_VECTORS * matched + FROZEN_VECTORS * frozen),
            "trace": 4 * (config.distill.student_steps + 1) * self._parameters,
            "call": 0 if self.backbone is None else chunk * self._bytes_of_an_image,
            "validation": max(trained, 2 * SCORING_BATCH * self._cost(0).largest) + gathered,
            "meta": sum(IMAGES_AT_A_TIME * each.maps for each in seen),
        }

    @property
    def memory(self) -> str:
        """What the worker takes of what it may, in words."""
        limit = "as the GPU allows" if self.budget is None else f"of {size_in_words(self.budget)}"
        return f"{size_in_words(total(self.parts))} {limit}"

    def lines(self) -> list[str]:
        """Parts of the memory, a line each."""
        parts = [f"    {size_in_words(size):>10}  {PARTS[name][0]}" for name, size in self.parts.items() if size]
        return [f"  memory of a worker that {self.name}, with a margin of {MARGIN - 1:.0%} on tensors:", *parts]

    def require_fit(self, *remedies: str) -> None:
        """Raise a `ConfigError` if the worker needs more memory than it may take. It lists `remedies` first."""
        needed, found = total(self.parts), list(remedies)
        if self.budget is None or needed <= self.budget:
            return
        parts = at_worst(self.parts)
        can_help = [name for name in parts if name != "process" or self.budget <= parts["process"]]
        largest = max(can_help, key=lambda name: parts[name])
        words, knob = PARTS[largest]
        more = range(self.shards + 1, self.shape.classes + 1)
        if enough := next((shards for shards in more if total(self.parts_with(shards, 1)) <= self.budget), None):
            found.append(f"use --set cluster.shards={enough}, which divides the set")
        found.append(f"raise --memory (cluster.memory) to {size_in_words(1.01 * needed)}")
        raise ConfigError(
            f"a worker that {self.name} needs {size_in_words(needed)} and may take {size_in_words(self.budget)}",
            f"{size_in_words(parts[largest])} of it is {words}",
            ", or ".join([*found, *([f"lower {knob}"] if knob else [])]),
        )

    def _held(self, shards: int) -> int:
        """Images of the largest shard."""
        return self.config.distill.ipc * -(-self.shape.classes // shards)

    @property
    def _row(self) -> int:
        """Bytes of an image and its soft label."""
        return 4 * (math.prod(self.shape.image) + self.shape.classes)

    @property
    def _maps(self) -> int:
        return COMPILED_MAPS if self.config.cluster.compile else UNCOMPILED_MAPS

    @property
    def _bytes_of_an_image(self) -> int:
        """Bytes of a micro-batch for each of its images."""
        return self._maps * self._cost(self.backbone or 0).maps + IMAGE_COPIES * self._row

    @property
    def _parameters(self) -> int:
        return 0 if self.backbone is None else self._cost(self.backbone).parameters

    def _cost(self, backbone: int) -> ImageCost:
        return network_cost(self.config.each_backbone()[backbone], self.shape)


def plans_of(config: RunConfig, shape: DataShape, layout: Layout | None = None) -> list[DistillationPlan]:
    """Plans of every network that a recipe matches, in the order of the networks. Arguments and errors: see
    `worker_plans`."""
    plans = (plan for plan in worker_plans(config, shape, layout) if plan.backbone is not None)
    return sorted(plans, key=lambda plan: plan.backbone or 0)


def worker_plans(config: RunConfig, shape: DataShape, layout: Layout | None = None) -> list[DistillationPlan]:
    """Plans of every worker of a set; takes less than a second, and no memory worth mentioning.

    Args:
        config: the recipe.
        shape: its data; 0 training images leave them out of a machine's memory.
        layout: workers that distil the set; None takes the recipe's own.

    Raises:
        ConfigError: a worker would need more memory than it may take, or there are more shards than classes.
    """
    layout = layout or Layout.of(config)
    require_whole_classes(layout.shards, shape.classes, config.name)
    budget = worker_budget(config, shape.bytes, layout.sharing)
    roles = layout.roles or (config.whole_role,)
    plans = [
        DistillationPlan(config, shape, role, number, layout.shards, budget)
        for role in roles
        for number in (role.backbones or (None,))
    ]
    others = config.cluster.memory is None and layout.sharing > layout.shards * len(roles)
    for plan in plans:
        plan.require_fit(*(["lower cluster.workers, so that fewer sets are distilled at a time"] if others else []))
    return plans


def network_cost(config: RunConfig, shape: DataShape) -> ImageCost:
    """Memory and operations of one image in a forward pass through the recipe's main network, `config.network`."""
    return _cost_of(config.network.for_images(shape.image[0], shape.image[1:], shape.classes))


@functools.lru_cache(maxsize=64)
def _cost_of(spec: NetworkSpec) -> ImageCost:
    return image_cost(build_network(spec, seed=0), (spec.channels, *spec.size))


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


def require_whole_classes(shards: int, classes: int, name: str) -> None:
    """Raise a `ConfigError` if there are more shards than classes."""
    if shards > classes:
        raise ConfigError(
            f"cluster.shards is {shards}, but {name} has {classes} classes",
            "a shard holds whole classes",
            f"use --set cluster.shards={classes} or fewer",
        )


def worker_budget(config: RunConfig, data_bytes: int = 0, sharing: int = 1) -> int | None:
    """Bytes that one distilling worker may take: `cluster.memory`, or what its device has free.

    Args:
        config: the recipe.
        data_bytes: bytes of the data set that the workers of a machine share.
        sharing: workers that share the machine.

    Returns:
        None where workers have GPUs that cannot be seen from here.
    """
    cluster = config.cluster
    if cluster.memory_bytes is not None:
        return cluster.memory_bytes
    if not uses_gpu(cluster):
        return max(0, available_memory() - data_bytes) // sharing
    if not torch.cuda.is_available():
        return None
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = int(torch.cuda.mem_get_info()[0]) + unused
    return int(GPU_SHARE * min(cluster.gpus_per_worker or 1.0, 1.0) * free)


def chunk_by_trial(step: Callable[[int], None], plan: DistillationPlan, device: torch.device) -> int:
    """Largest micro-batch whose step a GPU has room for: the plan's, or half of it, and so on down to one image.

    Args:
        step: computes one student step, forward and reverse, of so many images.
        plan: its micro-batch is tried first; beside the step the trial holds its trace, within its budget.
        device: the GPU.

    Raises:
        ConfigError: there is no room for one image.
    """
    limit = math.inf if plan.budget is None else torch.cuda.memory_allocated(device) + plan.budget
    chunk = plan.chunk
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
        f"it may take {'all of it' if plan.budget is None else size_in_words(plan.budget)}",
        "raise cluster.gpus_per_worker or --memory, use more cluster.shards, or lower distill.student_steps or "
        "network.width",
    )
