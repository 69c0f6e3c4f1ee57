"""What a distillation will take, told before it starts: memory of a worker, size of its micro-batches, work, traffic.

Everything follows from the recipe and the shape of an image; no data set, no GPU and no memory for activations is
needed. A recipe that does not fit is refused with the option that makes it fit.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from dataclasses import dataclass

import torch

from datm_ray.config import DatasetConfig, Role, RunConfig
from datm_ray.core.footprint import (
    CACHE_BYTES,
    CallCost,
    Footprint,
    call_cost,
    choose_chunk,
    footprint,
    looking_cost,
    scoring_bytes,
)
from datm_ray.core.instance_norm import InstanceNorm
from datm_ray.core.metadd import IMAGES_AT_A_TIME
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork
from datm_ray.core.step_functions import Order, Precision, StepOptions, StudentStepFunctions
from datm_ray.core.training import PROTOCOLS, predict_logits
from datm_ray.data.decode import require_memory
from datm_ray.data.sources import load_raw
from datm_ray.errors import ConfigError
from datm_ray.memory import available_memory
from datm_ray.runtime.devices import uses_gpu
from datm_ray.runtime.experts import network_spec
from datm_ray.store.trajectories import size_in_words

PROCESS_BYTES = 900 * 2**20
"""A worker without its tensors. Measured after importing torch and compiling both functions: 780 to 855 MiB resident,
of which 530 MiB are there after the import."""

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of a parameter in the trajectory store."""


@dataclass(frozen=True)
class DataShape:
    """All that planning needs to know of a data set."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    training_images: int
    """With those set aside for validation, or about so many."""


_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+),(\d+),(\d+)")


def parse_shape(text: str) -> DataShape:
    """A data set in numbers: channels x height x width, classes, training images, as in `3x64x64,200,100000`.

    Raises:
        ConfigError: it is not written so, or a number is 0.
    """
    match = _SHAPE.fullmatch(text.strip()) if text.isascii() and len(text) < 100 else None
    if match is None or not all(int(number) for number in match.groups()):
        raise ConfigError(
            f"--data-shape {text!r} is no shape of a data set",
            remedy="write channels x height x width, classes, training images, as 3x64x64,1000,1281167",
        )
    channels, height, width, classes, images = map(int, match.groups())
    if max(channels, height, width) > 2**14 or classes > 10**6 or not classes <= images <= 10**10:
        raise ConfigError(
            f"--data-shape {text!r} is larger than any data set, or has fewer images than classes",
            remedy="write channels x height x width, classes, training images, as 3x64x64,1000,1281167",
        )
    return DataShape((channels, height, width), classes, images)


KNOWN_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1438),
    "cifar10": DataShape((3, 32, 32), 10, 50_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000),
    "tiny-imagenet": DataShape((3, 64, 64), 200, 100_000),
}
"""Sources whose shape is known without their files."""


@dataclass(frozen=True)
class Layout:
    """Who distils a set."""

    shards: int
    roles: tuple[Role, ...]
    """Of the rows of workers; none where one row does everything."""
    sharing: int
    """Distilling workers that one machine has at a time."""

    def role_of(self, backbone: int, config: RunConfig) -> Role:
        """Of the workers that match a backbone."""
        return next((role for role in self.roles if backbone in role.backbones), config.whole_role)

    @classmethod
    def of(cls, config: RunConfig, workers_of_all_sets: int = 0, workers_here: int | None = None) -> Layout:
        """The recipe's own.

        Args:
            workers_of_all_sets: that are wanted at the same time; this set's where not given.
            workers_here: for which a machine has room; where it is not known, as for this machine.
        """
        cluster = config.cluster
        room = workers_here or cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
        sharing = min(room, workers_of_all_sets or config.workers_per_set)
        return cls(cluster.shards, config.roles, sharing)


ALONE = Layout(1, (), 1)
"""One worker that has the machine to itself."""


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
    meta_flop: int
    """Of MetaDD, beside."""
    network_bytes: int
    """That each shard sums with the others in one iteration."""
    store_bytes: int
    """Of the expert trajectories."""

    def lines(self) -> list[str]:
        """The plan as text for people."""
        parts = self.footprint
        shares = f" on each of {self.shards} shards" if self.shards > 1 else ""
        limit = "as the GPU allows" if self.budget is None else f"of {size_in_words(self.budget)}"
        rows = [
            ("images", f"{self.images:,}"),
            ("student steps", f"{self.steps:,} of {self.batch:,} images"),
            ("micro-batch", f"{self.chunk:,} images"),
            ("process", size_in_words(parts.process)),
            ("synthetic set", size_in_words(parts.synthetic)),
            ("network", size_in_words(parts.network)),
            ("trace", size_in_words(parts.trace)),
            ("one micro-batch", size_in_words(parts.call)),
            ("or validation", f"{size_in_words(parts.scoring + parts.gathered)}, in place of the two"),
            *([("or MetaDD", f"{size_in_words(parts.meta)}, in place of the two")] if parts.meta else []),
            ("total", f"{size_in_words(parts.total)} {limit}"),
            ("training images", f"{size_in_words(self.data_bytes)}, shared by the workers of a machine"),
            ("work", f"{self.flop / 1e12:,.3g} TFLOP an iteration"),
            *([("MetaDD's work", f"{self.meta_flop / 1e12:,.3g} TFLOP an iteration")] if self.meta_flop else []),
            ("network traffic", f"{size_in_words(self.network_bytes)} summed an iteration{shares}"),
            ("expert store", size_in_words(self.store_bytes)),
        ]
        return [self.name, *(f"  {label:<16} {value}" for label, value in rows)]


def data_shape(dataset: DatasetConfig, *, here: bool = False) -> DataShape:
    """The shape of a recipe's data; files are read only where the source does not tell it.

    Args:
        here: whether the run will be on this machine, where resized images of any source must fit into memory. Files
            that are read must fit in any case.

    Raises:
        DatasetError: a folder or file of images that cannot be read, or does not fit into memory.
    """
    if dataset.source not in KNOWN_SHAPES:
        raw = load_raw(dataset.source, dataset.path, resize=dataset.resize, validation=dataset.validation, copies=2)
        return DataShape((raw.channels, *raw.size), raw.classes, len(raw.train) + len(raw.validation))
    shape = KNOWN_SHAPES[dataset.source]
    if dataset.resize is None:
        return shape
    if here:
        require_memory(shape.training_images, (shape.image[0], dataset.resize, dataset.resize), copies=2)
    return DataShape((shape.image[0], dataset.resize, dataset.resize), shape.classes, shape.training_images)


def distillation_plan(
    config: RunConfig,
    image: tuple[int, int, int],
    classes: int,
    *,
    backbone: int = 0,
    layout: Layout | None = None,
    training_images: int = 0,
) -> DistillationPlan:
    """Plan one network of a recipe; takes seconds and no memory worth mentioning.

    Args:
        image: channels, height, width.
        backbone: which of the recipe's networks; a worker that matches several does so in turn.
        layout: who distils the set; the recipe's own where not given.
        training_images: of the data set, where its size is to count.

    Raises:
        ConfigError: a worker would need more memory than it may take.
    """
    settings, layout = config.distill, layout or Layout.of(config)
    require_whole_classes(layout.shards, classes, config.name)
    need = _Need.of(config, image, classes, backbone, layout)
    data_bytes = 4 * training_images * math.prod(image)
    budget = worker_budget(config, data_bytes, layout.sharing)
    images, batch = settings.ipc * classes, min(settings.batch_size, settings.ipc * classes)
    chunk = _chunk(need, layout.shards, batch, budget, None if uses_gpu(config.cluster) else CACHE_BYTES) or 1
    parameters = need.parameters
    plan = DistillationPlan(
        name=config.name + (f", backbone {backbone}" if config.backbones else ""),
        shards=layout.shards,
        images=images,
        steps=settings.student_steps,
        batch=batch,
        chunk=chunk,
        footprint=need.footprint(layout.shards, chunk),
        budget=budget,
        data_bytes=data_bytes,
        flop=settings.student_steps * batch * (need.cost.forward_flop + need.cost.reverse_flop),
        meta_flop=need.meta_flop,
        network_bytes=4 * settings.student_steps * (2 * parameters + 1) if layout.shards > 1 else 0,
        store_bytes=STORED_BYTES[config.experts.storage] * config.experts.count * len(config.kept_epochs) * parameters,
    )
    more = range(layout.shards + 1, classes + 1)
    enough = (shards for shards in more if need.footprint(shards, 1).total <= (budget or 0))
    others_share = layout.sharing > layout.shards * max(1, len(layout.roles))
    _require_fits(plan, next(enough, None), shared=config.cluster.memory is None and others_share)
    if backbone == 0 and budget is not None:
        for role in layout.roles:
            if not role.backbones:
                _require_onlooker_fits(config, image, classes, role, need, budget)
    return plan


def _require_onlooker_fits(
    config: RunConfig, image: tuple[int, int, int], classes: int, role: Role, need: _Need, budget: int
) -> None:
    """That a worker fits which matches nothing and only looks on, for MetaDD; it holds a set like the others."""
    looking = _of_meta(config, image, classes, role)
    parts = footprint(
        parameters=0,
        steps=0,
        images=need.images(config.cluster.shards),
        image=image,
        classes=classes,
        call=0,
        chunk=0,
        process=need.process,
        frozen=looking["frozen"],
        meta=looking["meta"],
    )
    if parts.total > budget:
        place = role.meta_networks[0] - 1
        raise ConfigError(
            f"a worker that holds metadd.auxiliaries.{place} of {config.name} needs {size_in_words(parts.total)} and "
            f"may take {size_in_words(budget)}",
            f"the network has {looking['frozen']:,} parameters",
            f"raise --memory (cluster.memory) to {size_in_words(1.01 * parts.total)}, or choose a smaller network",
        )


@dataclass(frozen=True)
class _Need:
    """What decides a worker's footprint, but for the number of shards and the micro-batch."""

    image: tuple[int, int, int]
    classes: int
    ipc: int
    steps: int
    parameters: int
    beside: int
    """Parameters of the other networks that the worker matches in turn."""
    cost: CallCost
    process: int
    scoring: int
    frozen: int
    """Parameters of the networks of MetaDD that the worker holds."""
    meta: int
    """Bytes of activations of one of them."""
    meta_flop: int
    """Of all of them in one iteration."""

    @classmethod
    def of(cls, config: RunConfig, image: tuple[int, int, int], classes: int, backbone: int, layout: Layout) -> _Need:
        """Of one network of a recipe."""
        specs = [network_spec(each, image[0], image[1:], classes) for each in config.each_backbone()]
        counts = [FlatNetwork(build_network(spec, seed=0)).count for spec in specs]
        role = layout.role_of(backbone, config)
        return cls(
            image=image,
            classes=classes,
            ipc=config.distill.ipc,
            steps=config.distill.student_steps,
            parameters=counts[backbone],
            beside=sum(counts[other] for other in role.backbones if other != backbone),
            cost=_cost(specs[backbone], config.cluster.compile, config.cluster.channels_last, config.cluster.precision),
            process=0 if uses_gpu(config.cluster) else PROCESS_BYTES,
            scoring=_scoring(specs[0], config.distill.ipc * classes),
            **_of_meta(config, image, classes, role),
        )

    def images(self, shards: int) -> int:
        """That a shard holds at most."""
        return self.ipc * -(-self.classes // shards)

    def footprint(self, shards: int, chunk: int) -> Footprint:
        """Of a worker, one of so many shards, with micro-batches of so many images."""
        return footprint(
            parameters=self.parameters,
            steps=self.steps,
            images=self.images(shards),
            image=self.image,
            classes=self.classes,
            call=self.cost.bytes(chunk),
            chunk=chunk,
            process=self.process,
            scoring=self.scoring,
            frozen=self.frozen,
            meta=self.meta,
            gathered=self.images(1) if shards > 1 else 0,
            beside=self.beside,
        )


def _of_meta(config: RunConfig, image: tuple[int, int, int], classes: int, role: Role) -> dict[str, int]:
    """Parameters and activations of the networks of MetaDD that a worker holds."""
    if config.metadd is None or not role.meta_networks:
        return {"frozen": 0, "meta": 0, "meta_flop": 0}
    looking = [config.each_backbone()[0], *config.each_auxiliary()]
    specs = [network_spec(looking[place], image[0], image[1:], classes) for place in role.meta_networks]
    counts = [FlatNetwork(build_network(spec, seed=0)).count for spec in specs]
    costs = [_looking(spec, IMAGES_AT_A_TIME) for spec in specs]
    return {
        "frozen": sum(counts) * config.metadd.experts.count,
        "meta": max(size for size, _ in costs),
        "meta_flop": round(config.metadd.share * config.distill.ipc * classes * sum(each for _, each in costs)),
    }


def looking_flop(config: RunConfig, image: tuple[int, int, int], classes: int, role: Role) -> int:
    """Of MetaDD's networks that a row of workers holds, in one iteration, over all shards."""
    return _of_meta(config, image, classes, role)["meta_flop"]


def _chunk(need: _Need, shards: int, batch: int, budget: int | None, cache: int | None) -> int:
    """Images of a micro-batch; 0 if not even one fits."""
    rest = need.footprint(shards, 0)
    left = float("inf") if budget is None else budget - rest.process - rest.synthetic - rest.network - rest.trace
    held = rows_at_a_time(need.images(1), need.images(shards), batch)
    return choose_chunk(need.cost, need.image, need.classes, held, left, cache)


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


GPU_SHARE = 0.9
"""Of a GPU's free memory that a plan may fill: what is not predicted (workspaces, fragments) was measured on no GPU."""


def worker_budget(config: RunConfig, data_bytes: int = 0, sharing: int = 1) -> int | None:
    """Bytes that one distilling worker may take: what the recipe says, or else what its device has free.

    Args:
        data_bytes: of the data set that the workers of a machine share.
        sharing: workers that share the machine.
    """
    cluster = config.cluster
    if cluster.memory_bytes is not None:
        return cluster.memory_bytes
    if uses_gpu(cluster):
        if not torch.cuda.is_available():
            return None
        asked = cluster.gpus_per_worker or 1.0
        return int(GPU_SHARE * min(asked, 1.0) * free_gpu_memory())
    return max(0, available_memory() - data_bytes) // sharing


def free_gpu_memory() -> int:
    """Bytes of the current GPU that this process can take: what nobody holds, and what it holds and does not use."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


@functools.lru_cache(maxsize=16)
def _cost(spec: NetworkSpec, compiled: bool, channels_last: bool, precision: Precision) -> CallCost:
    """Of the worker's functions; no compiler is tried out here."""
    order: Order = "reverse-over-forward" if compiled else "reverse-over-reverse"
    options = StepOptions(compiled=False, order=order, channels_last=channels_last, precision=precision)
    functions = StudentStepFunctions(FlatNetwork(build_network(spec, seed=0)), options)
    for part in functions.network.module.modules():
        if isinstance(part, InstanceNorm):
            part.explicit = compiled
    return call_cost(functions, (spec.channels, *spec.size), spec.classes, compiled=compiled)


@functools.lru_cache(maxsize=16)
def _looking(spec: NetworkSpec, images: int) -> tuple[int, int]:
    network = FlatNetwork(build_network(spec, seed=0).eval())
    return looking_cost(network, (spec.channels, *spec.size), spec.classes, images)


@functools.lru_cache(maxsize=16)
def _scoring(spec: NetworkSpec, images: int) -> int:
    scored = int(inspect.signature(predict_logits).parameters["batch_size"].default)
    trained = min(PROTOCOLS["short"].batch_size, images)
    network = FlatNetwork(build_network(spec, seed=0))
    return scoring_bytes(network, (spec.channels, *spec.size), spec.classes, trained, scored)


WORDS = {
    "process": "the process itself",
    "synthetic": "its share of the synthetic set",
    "network": "the network and sums of its gradients",
    "trace": "the trace of the student's steps",
    "call": "the smallest micro-batch",
    "scoring": "validation",
    "gathered": "the whole synthetic set, which one worker gathers for validation",
    "meta": "the networks of metadd",
}
LOWER = {
    "synthetic": "distill.ipc",
    "gathered": "distill.ipc",
    "network": "network.width",
    "trace": "distill.student_steps",
    "call": "network.width or dataset.resize",
    "scoring": "network.width or dataset.resize",
    "meta": "dataset.resize, or choose smaller metadd.auxiliaries",
}
"""What makes a part smaller, beside more memory or more shards."""


def _require_fits(plan: DistillationPlan, shards_that_fit: int | None, *, shared: bool) -> None:
    parts = plan.footprint
    if plan.budget is None or parts.total <= plan.budget:
        return
    largest = parts.largest_part
    remedies = [f"raise --memory (cluster.memory) to {size_in_words(1.01 * parts.total)}"]
    if shards_that_fit is not None:
        remedies.insert(0, f"use --set cluster.shards={shards_that_fit}, which divides the set")
    if largest in LOWER:
        remedies.append(f"lower {LOWER[largest]}")
    if shared:
        remedies.insert(0, "lower cluster.workers, so that fewer sets are distilled at a time")
    raise ConfigError(
        f"a worker that distils {plan.name} needs {size_in_words(parts.total)} and may take "
        f"{size_in_words(plan.budget)}",
        f"most of it, {size_in_words(getattr(parts, largest))}, is {WORDS[largest]}",
        ", or ".join(remedies),
    )
