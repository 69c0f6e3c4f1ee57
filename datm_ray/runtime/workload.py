"""What a whole recipe computes, sums and stores, counted from the recipe and the shape of its data.

Operations are those of convolutions and matrix products, read from graphs (`core/footprint.py`); bytes are counted as
the code sums and writes them. What that takes on a machine is `cost.py`'s. Tests: tests/runtime/test_workload.py.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datm_ray.artifact import INLINE_BYTES
from datm_ray.config import ClusterConfig, Role, RunConfig
from datm_ray.core.distillation import HISTORY_COLUMNS
from datm_ray.core.experts import LARGEST_STACK
from datm_ray.core.footprint import training_cost
from datm_ray.core.metadd import IMAGES_AT_A_TIME
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork, float_buffers
from datm_ray.core.training import PROTOCOLS, validation_protocol
from datm_ray.data.transform import FitCost
from datm_ray.errors import ConfigError
from datm_ray.runtime.cost import (
    Described,
    Estimate,
    Machine,
    Matched,
    Row,
    Traffic,
    Training,
    Workload,
    assumptions,
    candidate_shards,
    checkpoint_bytes,
    estimate,
)
from datm_ray.runtime.devices import uses_gpu
from datm_ray.runtime.evaluate import CONTROL_STEP_SIZES, ON_OTHERS
from datm_ray.runtime.experts import experts_at_a_time, network_spec
from datm_ray.runtime.plan import (
    STORED_BYTES,
    DataShape,
    DistillationPlan,
    Layout,
    distillation_plan,
    looking_flop,
)
from datm_ray.store.trajectories import size_in_words

HISTORY_BYTES = sum(np.dtype(kind).itemsize for kind in HISTORY_COLUMNS.values())
"""Of one iteration and backbone in a checkpoint."""


@dataclass(frozen=True)
class Storage:
    """Bytes that a run leaves behind."""

    store: int
    """Expert trajectories, auxiliaries' included, and a transform for each group of experts."""
    checkpoint: int
    """Of the last; while one replaces another there are two."""
    results: int
    """The initial and the final set, and their transform."""

    @property
    def total(self) -> int:
        """At the end."""
        return self.store + self.checkpoint + self.results


def workload(config: RunConfig, shape: DataShape, plans: Sequence[DistillationPlan]) -> Workload:
    """What a recipe computes in the layout that it has.

    Args:
        plans: of every backbone, for their micro-batches.
    """
    settings, shards = config.distill, config.cluster.shards
    images = settings.ipc * shape.classes
    training = round(shape.training_images * (1 - config.dataset.validation))
    validation = shape.training_images - training
    gradient, scoring = _training(_specs(config, shape)[0])
    epochs = PROTOCOLS[validation_protocol(config.evaluate.protocol)].epochs
    return Workload(
        experts=tuple(_expert_trainings(config, shape, training)),
        evaluation=tuple(_evaluation(config, shape, training)),
        iterations=settings.iterations,
        steps=settings.student_steps,
        batch=min(settings.batch_size, images),
        images=images,
        held=settings.ipc * -(-shape.classes // shards),
        row_bytes=4 * (math.prod(shape.image) + shape.classes),
        rows=tuple(_row(config, shape, role, plans) for role in config.roles),
        traffic=max((traffic(config, shape, role) for role in config.roles), key=lambda each: each.over_classes),
        shards=shards,
        # Twice the images wanted are looked at, which is enough where an expert gets half of them right; then every
        # expert labels those that were chosen.
        choosing=images * (2 + config.experts.count) * scoring,
        validations=-(-settings.iterations // settings.validate_every),
        validation_flop=settings.validation_seeds * epochs * images * gradient,
        scoring_flop=settings.validation_seeds * validation * scoring,
        checkpoints=-(-settings.iterations // settings.checkpoint_every),
    )


def traffic(config: RunConfig, shape: DataShape, role: Role) -> Traffic:
    """What a worker of the largest shard hands to sums in one iteration in which nothing is skipped.

    Where MetaDD looks at some of the images, how many of them the shard holds is drawn; counted is the mean.
    """
    settings, shards, rows = config.distill, config.cluster.shards, len(config.roles)
    specs = _specs(config, shape)
    found = Traffic()
    if shards > 1:
        # A gradient for every student step, one with s for every step back, the loss, the length of the update and
        # whether it is finite (in float64); at the end, whether the updated set is.
        steps = settings.student_steps
        parameters = sum(_parameters(specs[number]) for number in role.backbones)
        values = steps * (2 * parameters + len(role.backbones)) + 6 * len(role.backbones) + 1
        sums = len(role.backbones) * (2 * steps + 2) + 1
        if config.metadd is not None:
            values, sums = values + 6, sums + 1
        found = Traffic(over_classes=4 * values, class_sums=sums)
    if rows > 1:
        over, sums = _over_networks(config, shape)
        found = Traffic(found.over_classes, found.class_sums, over, sums)
    return found


def _over_networks(config: RunConfig, shape: DataShape) -> tuple[int, int]:
    """Bytes and sums of a worker with those that hold its rows for other networks."""
    settings, backbones = config.distill, len(config.weights)
    held = settings.ipc * -(-shape.classes // config.cluster.shards)
    # In float64: losses, first-order decreases, what diverged and whether MetaDD did. Then images, soft labels and step
    # sizes.
    size = 32 * backbones + 4 * (held * (math.prod(shape.image) + shape.classes) + backbones)
    sums = 4
    if config.metadd is not None:
        looked = config.metadd.share * held
        # Maps and logits of every network, of some images at a time.
        size += round(4 * config.meta_network_count * looked * (math.prod(shape.image[1:]) + shape.classes))
        sums += 2 * math.ceil(looked / IMAGES_AT_A_TIME)
    return size, sums


def storage(config: RunConfig, shape: DataShape) -> Storage:
    """What a finished run leaves behind, but for reports, which are small."""
    images = config.distill.ipc * shape.classes
    row, transform = 4 * (math.prod(shape.image) + shape.classes), transform_bytes(config, shape)
    store = 0
    for each in (*config.each_backbone(), *config.each_auxiliary()):
        experts = each.experts
        spec = network_spec(each, shape.image[0], shape.image[1:], shape.classes)
        snapshot = STORED_BYTES[experts.storage] * _parameters(spec) + 4 * _buffers(spec)
        store += experts.count * len(each.kept_epochs) * snapshot + transform
    history = HISTORY_BYTES * len(config.weights) * config.distill.iterations
    return Storage(
        store=store,
        checkpoint=checkpoint_bytes(images, row, chosen=True) + history,
        results=2 * images * (row + 8) + (2 if transform <= INLINE_BYTES else 1) * transform,
    )


def transform_bytes(config: RunConfig, shape: DataShape) -> int:
    """Bytes of a data set's normalisation. Whitening has an eigenvector for every value of an image, and is large."""
    values = math.prod(shape.image)
    return 4 * values * (values + 3) if config.dataset.resolved(shape.image[1:]).kind == "zca" else 8 * shape.image[0]


def _row(config: RunConfig, shape: DataShape, role: Role, plans: Sequence[DistillationPlan]) -> Row:
    matched = tuple(
        Matched(plans[number].flop / (plans[number].steps * plans[number].batch), plans[number].chunk)
        for number in role.backbones
    )
    return Row(matched, looking_flop(config, shape.image, shape.classes, role))


def _expert_trainings(config: RunConfig, shape: DataShape, training: int) -> list[Training]:
    found = []
    for each in (*config.each_backbone(), *config.each_auxiliary()):
        experts = each.experts
        gradient, _ = _training(network_spec(each, shape.image[0], shape.image[1:], shape.classes))
        passes = experts.epochs * (2 if experts.optimiser == "gsam" else 1)
        stack = min(experts.count, experts_at_a_time(each, shape.image, shape.classes))
        name = f"{experts.count} {each.network.architecture}"
        found.append(Training(name, experts.count, training * passes * gradient, "experts", stack))
    return found


def _evaluation(config: RunConfig, shape: DataShape, training: int) -> list[Training]:
    """Networks of the table and of other architectures; a control tries several step sizes."""
    settings, tried = config.evaluate, len(CONTROL_STEP_SIZES)
    images, epochs = config.distill.ipc * shape.classes, PROTOCOLS[config.evaluate.protocol].epochs
    gradient, _ = _training(_specs(config, shape)[0])
    on_set = epochs * images * gradient
    found = [
        Training("controls", 2 * settings.seeds, tried * on_set),
        Training("distilled", settings.seeds, on_set),
        Training("all real data", settings.seeds, tried * settings.real_epochs * training * gradient),
    ]
    if settings.fair:  # hard labels and random images try several step sizes
        found.append(Training("rows of the fair scores", 3 * settings.seeds, (2 * tried + 2) / 3 * on_set))
    for network in config.scored_networks:
        other = config.model_copy(update={"network": network})
        gradient, _ = _training(network_spec(other, shape.image[0], shape.image[1:], shape.classes))
        trained = len(ON_OTHERS) * tried + 1
        flop = trained * epochs * images * gradient / len(ON_OTHERS)
        found.append(Training(network.architecture, len(ON_OTHERS) * settings.seeds, flop))
    return found


def _specs(config: RunConfig, shape: DataShape) -> list[NetworkSpec]:
    return [network_spec(each, shape.image[0], shape.image[1:], shape.classes) for each in config.each_backbone()]


@functools.lru_cache(maxsize=64)
def _parameters(spec: NetworkSpec) -> int:
    return FlatNetwork(build_network(spec, seed=0)).count


@functools.lru_cache(maxsize=64)
def _buffers(spec: NetworkSpec) -> int:
    """Numbers of a batch norm's running statistics."""
    return sum(buffer.numel() for buffer in float_buffers(build_network(spec, seed=0)).values())


@functools.lru_cache(maxsize=64)
def _training(spec: NetworkSpec) -> tuple[int, int]:
    network = FlatNetwork(build_network(spec, seed=0).eval())  # batch statistics would be counted in place
    return training_cost(network, (spec.channels, *spec.size), spec.classes)


# --- layouts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A recipe in a layout on a machine, and what it takes there."""

    config: RunConfig
    """The recipe with that layout."""
    shape: DataShape
    plans: list[DistillationPlan]
    """Of every backbone."""
    work: Workload
    machine: Machine
    estimate: Estimate
    described: Described

    def headline(self) -> str:
        """What most people want to know."""
        memory = max(plan.footprint.total for plan in self.plans)
        return (
            f"{self.config.name}: {size_in_words(memory)} a worker, "
            f"about {show_number(self.estimate.total_hours)} {self.machine.hours}, "
            f"{size_in_words(storage(self.config, self.shape).total)} of storage"
        )

    def lines(self, *, suggested: bool) -> list[str]:
        """Time, traffic, storage and what they rest on as text for people, to stand below the plans.

        Args:
            suggested: whether to say how to ask for the layout.
        """
        told, machine, kept = self.estimate, self.machine, storage(self.config, self.shape)
        part, sent = told.iteration, self.work.traffic.sent(self.work.shards, len(self.work.rows))
        seconds = (
            f"{show_number(part.compute)} computing, {show_number(part.sums)} sums, {show_number(part.update)} update"
        )
        rows = [
            ("an iteration", f"{show_number(part.total)} s: {seconds}"),
            ("a worker sends", f"{size_in_words(sent)} an iteration"),
            *[(stage, f"{show_number(hours)} {machine.hours}") for stage, hours in told.hours.items()],
            ("in all", f"{show_number(told.total_hours)} {machine.hours}"),
            (
                "storage",
                f"{size_in_words(kept.total)}: store {size_in_words(kept.store)}, "
                f"results {size_in_words(kept.results)}, "
                f"checkpoint {size_in_words(kept.checkpoint)} (twice while one replaces another)",
            ),
        ]
        fitting = FitCost.of(self.config.dataset.resolved(self.shape.image[1:]).kind, self.shape.image)
        if fitting.size:
            rows.insert(
                -1, ("fitting zca", f"{fitting}, once for each data set, by the process that starts the workers")
            )
        if suggested:
            clock = ", ".join(f"{stage} {show_number(hours)}" for stage, hours in told.wall.items())
            rows += [
                ("layout", f"{self.settings()}: {self.work.workers} of {machine.workers} workers distil"),
                ("on the clock", f"{show_number(told.total_wall)} hours: {clock}"),
            ]
        found = [f"  {label:<16} {value}" for label, value in rows]
        return [*found, "  Assumptions:", *(f"    {each}" for each in assumptions(machine, self.work, self.described))]

    def settings(self) -> str:
        """What asks for the layout on the command line."""
        cluster = self.config.cluster
        said = [f"cluster.shards={cluster.shards}"]
        said += ["cluster.auxiliaries_apart=true"] if cluster.auxiliaries_apart else []
        said += [f"cluster.gpus_per_worker={cluster.gpus_per_worker:g}"] if cluster.gpus_per_worker else []
        said += [f"cluster.experts_at_a_time={cluster.experts_at_a_time}"] if cluster.experts_at_a_time else []
        size = self.machine.memory
        whole = size is not None and size % 2**30 == 0
        memory = [] if size is None else [f"--memory {f'{size // 2**30}GiB' if whole else size}"]
        return " ".join([*(f"--set {each}" for each in said), *memory])


def described_here(config: RunConfig) -> Described:
    """The workers that a recipe has without a description: those it asks for, or all that this machine has."""
    cluster = config.cluster
    if uses_gpu(cluster):
        return Described("GPU", cluster.workers or torch.cuda.device_count() or config.workers_per_set)
    cores = cluster.workers * cluster.threads_per_worker if cluster.workers else os.cpu_count() or 1
    return Described("core", max(cores, cluster.threads_per_worker))


def as_it_is(config: RunConfig, shape: DataShape, layout: Layout, described: Described, machine: Machine) -> Proposal:
    """The recipe's own layout on a machine.

    Raises:
        ConfigError: it does not fit.
    """
    plans = plans_of(config, shape, layout)
    work = workload(config, shape, plans)
    return Proposal(config, shape, plans, work, machine, estimate(work, machine), described)


def propose(config: RunConfig, shape: DataShape, described: Described, machine: Machine) -> Proposal:
    """The layout in which a set is distilled soonest, or the one of fewest workers that takes at most 5 % longer.

    Raises:
        ConfigError: the set fits in none, or the machine has not as many workers as the recipe wants at least.
    """
    found: list[Proposal] = []
    failure: ConfigError | None = None
    for apart in (False, True) if config.metadd is not None else (False,):
        rows = len(_laid_out(config, machine, 1, apart=apart).roles)
        for shards in candidate_shards(machine.workers // rows, shape.classes):
            laid_out = _laid_out(config, machine, shards, apart=apart)
            layout = Layout(shards, laid_out.roles, laid_out.workers_per_set)
            try:
                found.append(as_it_is(laid_out, shape, layout, described, machine))
            except ConfigError as unfit:
                failure = unfit
    if not found:
        raise failure or ConfigError(
            f"{config.name} wants {rows} workers at once, and the cluster has {machine.workers}",
            "its networks are apart",
            "lower cluster.backbones_apart, or describe a larger cluster",
        )
    enough = 1.05 * min(_distilling(each) for each in found)
    return min((each for each in found if _distilling(each) <= enough), key=lambda each: each.work.workers)


def not_followed(recipe: RunConfig, proposal: Proposal) -> list[str]:
    """What a recipe sets for itself and the proposed layout has otherwise, a line at most."""
    ours, theirs, usual = recipe.cluster, proposal.config.cluster, ClusterConfig()
    said = [
        f"cluster.{name}={value:g}"
        for name in ("shards", "workers", "gpus_per_worker")
        if (value := getattr(ours, name)) not in (getattr(usual, name), getattr(theirs, name))
    ]
    return [f"  {'not followed':<16} {', '.join(said)} of the recipe: --cluster chooses these"] if said else []


def _distilling(proposal: Proposal) -> float:
    return proposal.estimate.wall["distillation"] + proposal.estimate.wall["validation"]


def _laid_out(config: RunConfig, machine: Machine, shards: int, *, apart: bool) -> RunConfig:
    """The recipe as it would be run on a machine."""
    gpu = machine.device == "GPU"
    cluster = config.cluster.model_copy(
        update={
            "shards": shards,
            "workers": None,
            "auxiliaries_apart": apart,
            "device": "auto" if gpu else "cpu",
            "gpus_per_worker": 1.0 if gpu else 0.0,
            "memory": config.cluster.memory if machine.memory is None else str(machine.memory),
            "experts_at_a_time": config.cluster.experts_at_a_time or _stack_for_all(config, machine),
        }
    )
    return config.model_copy(update={"cluster": cluster})


def _stack_for_all(config: RunConfig, machine: Machine) -> int | None:
    """Experts of a stack, where the largest stacks would leave GPUs without any; none where they would not."""
    share = -(-config.experts.count // machine.workers)
    return share if machine.device == "GPU" and share < LARGEST_STACK else None


def plans_of(config: RunConfig, shape: DataShape, layout: Layout) -> list[DistillationPlan]:
    """Of every backbone of a recipe."""
    return [
        distillation_plan(
            config,
            shape.image,
            shape.classes,
            backbone=backbone,
            layout=layout,
            training_images=shape.training_images,
        )
        for backbone in range(len(config.weights))
    ]


def show_number(value: float) -> str:
    """With three digits that matter, and thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
