"""How long a run takes on a machine, in which layout a set is distilled soonest, and what a run stores.

Work is counted in image passes: one image, once through one training step. Operations of a pass over the machine's
rate are seconds; `measured` finds the rates on this machine from a few real steps. Not counted are compiling, starting
workers, choosing the first images, and faults. Accuracy: benchmarks/README.md. Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from datm_ray.artifact import INLINE_BYTES
from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.experts import LARGEST_STACK, ExpertFunctions, ExpertState, chunk_in_cache, train_experts
from datm_ray.core.networks.parameters import FlatNetwork, flatten, float_buffers
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training import PROTOCOLS, train, validation_protocol
from datm_ray.errors import ConfigError
from datm_ray.methods.state import columns
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.methods.trajectory.iteration import IterationRecord
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.planning.fit import DataShape, DistillationPlan, fitting_cost, network_cost, plans_of, total
from datm_ray.planning.machines import Machine
from datm_ray.runtime.devices import prepare_device
from datm_ray.stages.distill import evaluation_schedule
from datm_ray.stages.evaluate import CONTROL_STEP_SIZES, ON_OTHERS, ROWS
from datm_ray.stages.experts import experts_at_a_time
from datm_ray.store.trajectories import size_in_words

FORWARD_PASSES = {"matching": 11, "experts": 3, "training": 3}
"""Operations of one image pass of each kind, as a multiple of one forward pass."""
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a parameter in the trajectory store."""
REPEATED, STEPS = 3, 10
"""Repetitions of each kind of work that `measured` times, after one that warms up, and student steps of each."""


@dataclass(frozen=True)
class Proposal:
    """A recipe in a layout on a machine, and what it takes there."""

    config: RunConfig
    """The recipe with that layout."""
    shape: DataShape
    plans: list[DistillationPlan]
    """Plans of the networks that it matches."""
    machine: Machine

    def seconds(self, kind: str, network: RunConfig, passes: float) -> float:
        """Seconds that one worker takes for so many image passes through a network."""
        return FORWARD_PASSES[kind] * network_cost(network, self.shape).flop * passes / self.machine.rates[kind]

    @property
    def distance(self) -> Distance:
        """How far the experts and the student go."""
        return Distance.of(self.config, round(self.shape.training_images * (1 - self.config.dataset.validation)))

    @property
    def iteration(self) -> tuple[float, float]:
        """Seconds of one matching iteration: computing on the slowest worker, and sums over workers."""
        config, steps, shards = self.config, self.config.distill.student_steps, self.config.cluster.shards
        backbones, held = config.each_backbone(), config.distill.ipc * -(-self.shape.classes // shards)
        looking, share = [backbones[0], *config.each_auxiliary()], config.metadd.share if config.metadd else 0.0
        computing, summing = 0.0, 0.0
        for role in config.roles:
            plans = [self.plans[number] for number in role.backbones]
            passes = [steps * -(-plan.rows // plan.chunk) * plan.chunk for plan in plans]  # the last chunk is padded
            own = sum(self.seconds("matching", backbones[n], p) for n, p in zip(role.backbones, passes, strict=True))
            own += sum(self.seconds("training", looking[place], share * held) for place in role.meta_networks)
            size = sum(plan.network_bytes for plan in plans)
            summing = max(summing, self.machine.sum_seconds(size, 2 * steps * len(plans), shards))
            computing = max(computing, own)
        rows = 4 * held * (math.prod(self.shape.image) + self.shape.classes)
        return computing, summing + self.machine.sum_seconds(rows, 4, len(config.roles))

    @property
    def stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> hours of all GPUs or cores that are held for it, and hours on the clock."""
        config, settings, workers = self.config, self.config.distill, self.machine.workers
        images = settings.ipc * self.shape.classes
        training = self.shape.training_images * (1 - config.dataset.validation)
        validations = -(-settings.iterations // settings.validate_every) * settings.validation_seeds
        epochs = PROTOCOLS[validation_protocol(config.evaluate.protocol)].epochs
        experts, clock = 0.0, 0.0
        for network in (*config.each_backbone(), *config.each_auxiliary()):
            own, stack = network.experts, experts_at_a_time(network, self.shape.image, self.shape.classes)
            passes = own.epochs * training * (2 if own.optimiser == "gsam" else 1)
            one = self.seconds("experts", network, passes)
            experts += own.count * one
            clock += min(own.count, stack * -(-own.count // (stack * workers))) * one
        distillation = settings.iterations * sum(self.iteration)
        validation = self.seconds("training", config.each_backbone()[0], validations * epochs * images)
        evaluation, rows = self._evaluation(images, training), len(ROWS) * config.evaluate.seeds
        seconds = {
            "experts": (experts, clock),
            "distillation": (distillation * config.workers_per_set, distillation),
            "validation": (validation * config.workers_per_set, validation),  # a set's other workers wait
            "evaluation": (evaluation, evaluation / min(workers, rows)),
        }
        return {name: (self.machine.cores * held / 3600, wall / 3600) for name, (held, wall) in seconds.items()}

    def _evaluation(self, images: int, training: float) -> float:
        """Seconds of all networks of the tables; a row without a learned step size tries several."""
        settings, tried = self.config.evaluate, len(CONTROL_STEP_SIZES)
        epochs, backbone = PROTOCOLS[settings.protocol].epochs, self.config.each_backbone()[0]
        on_set = 1 + 2 * tried + (2 + 2 * tried if settings.fair else 0)
        passes = on_set * epochs * images + tried * settings.real_epochs * training
        total = self.seconds("training", backbone, passes)
        for network in self.config.scored_networks:
            other = backbone.model_copy(update={"network": network})
            total += self.seconds("training", other, (1 + len(ON_OTHERS) * tried) * epochs * images)
        return settings.seeds * total

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """What the recipe takes, as plain data. Hours are `None` if no speed is known."""
        config, machine, computing_and_sums = self.config, self.machine, self.iteration
        held = {name: hours for name, (hours, _) in self.stages.items()}
        clock = {name: hours for name, (_, hours) in self.stages.items()}
        cluster = config.cluster.model_dump(include={"shards", "gpus_per_worker", "experts_at_a_time"})
        return {
            "name": config.name,
            "data": dataclasses.asdict(self.shape),
            "device": machine.device,
            "workers": machine.workers,
            "speed": machine.basis,
            "hours": held if machine.basis else None,
            "clock_hours": clock if machine.basis else None,
            "distance": self.distance.to_json(),
            "iteration_seconds": dict(zip(("computing", "sums"), computing_and_sums, strict=True)),
            "storage_bytes": storage(config, self.shape),
            "workers_per_set": config.workers_per_set,
            "cluster": cluster,
            "memory": [
                {"worker": each.name, "bytes": total(each.parts), "limit_bytes": each.budget, "parts": each.parts}
                for each in self.plans
            ],
        }

    def lines(self, *, suggested: bool = False, verbose: bool = False) -> list[str]:
        """What the recipe takes, as text for people; `suggested`: in a layout chosen for a described cluster."""
        config, shape, machine, plan = self.config, self.shape, self.machine, self.plans[0]
        settings, evaluated, kept, stages = config.distill, config.evaluate, storage(config, shape), self.stages
        unit, image = f"{machine.device.replace('core', 'CPU')}-hours", "x".join(map(str, shape.image))
        hours, clock = (
            {"in all": sum(each), **dict(zip(stages, each, strict=True))} for each in zip(*stages.values(), strict=True)
        )
        networks = (*config.each_backbone(), *config.each_auxiliary())
        trained = (
            f"{each.experts.count:,} {each.network.architecture}, {each.experts.epochs:,} epochs" for each in networks
        )
        rows = {
            "data": f"{shape.training_images:,} training images of {image} in {shape.classes:,} classes: "
            f"{size_in_words(shape.bytes)}, shared by the workers of a machine",
            "experts": "; ".join(trained),
            "distillation": f"{settings.iterations:,} iterations of {settings.student_steps:,} student steps of "
            f"{plan.batch:,} of {plan.images:,} images, in micro-batches of {plan.chunk:,}",
            "step sizes": "; ".join(self.distance.lines()),
            "evaluation": f"{evaluated.seeds:,} networks a row, {PROTOCOLS[evaluated.protocol].epochs:,} epochs",
            unit: f"{_listed(hours)}; {machine.basis}" if machine.basis else NO_HOURS,
            "storage": ", ".join(f"{name} {size_in_words(size)}" for name, size in kept.items()),
        }
        fitting = fitting_cost(config.dataset, shape)
        if fitting.size:
            rows["fitting zca"] = f"{fitting}, once, by the process that starts the workers"
        if suggested:
            rows["layout"] = f"{self.settings()}: {config.workers_per_set} of {machine.workers} workers distil"
        if machine.basis and (suggested or verbose):
            rows["hours on clock"] = _listed(clock)
        if verbose:
            computing, sums = map(show_number, self.iteration)
            size = size_in_words(sum(each.network_bytes for each in self.plans))
            rows["an iteration"] = f"{computing} s computing, {sums} s sums; a shard sums {size}"
        worst = max(self.plans, key=lambda each: total(each.parts))
        about = f"about {show_number(hours['in all'])} {unit}, " if machine.basis else ""
        found = [f"{config.name}: {worst.memory} a worker, {about}{size_in_words(sum(kept.values()))} of storage"]
        found += [f"  {label:<16} {value}" for label, value in rows.items()]
        return [*found, *(line for each in self.plans if verbose for line in each.lines())]

    def settings(self) -> str:
        """Options that ask for the layout on the command line."""
        cluster, size = self.config.cluster, self.machine.memory
        named = {
            "shards": cluster.shards,
            "gpus_per_worker": f"{cluster.gpus_per_worker:g}" if cluster.gpus_per_worker else None,
            "experts_at_a_time": cluster.experts_at_a_time,
        }
        options = [f"--set cluster.{name}={value}" for name, value in named.items() if value]
        if size is not None:
            options.append(f"--memory {size if size % 2**30 else f'{size // 2**30}GiB'}")
        return " ".join(options)


NO_HOURS = "unknown: no GPU was measured. Give its speed as tflops= in --cluster, or use --measure where it is"


def propose(config: RunConfig, shape: DataShape, machine: Machine) -> Proposal:
    """Fewest shards, among powers of two, that distil and validate at most 5 % longer than the fastest.

    Raises:
        ConfigError: the set fits in none, or the machine has fewer workers than the recipe wants at least.
    """
    rows, found, failure = len(config.roles), [], None
    most = min(machine.workers // rows, shape.classes)
    for shards in sorted({2**power for power in range(most.bit_length())} | {most} if most else set()):
        laid_out = _laid_out(config, machine, shards)
        try:
            found.append(Proposal(laid_out, shape, plans_of(laid_out, shape), machine))
        except ConfigError as unfit:
            failure = unfit
    if not found:
        raise failure or ConfigError(
            f"{config.name} needs {rows} workers at the same time, and the cluster has {machine.workers}",
            "its networks are on workers of their own",
            "lower cluster.backbones_apart, or describe a larger cluster",
        )
    clock = [each.stages["distillation"][1] + each.stages["validation"][1] for each in found]
    return next(each for each, hours in zip(found, clock, strict=True) if hours <= 1.05 * min(clock))


def _laid_out(config: RunConfig, machine: Machine, shards: int) -> RunConfig:
    """The recipe as it would be run on a machine."""
    own, gpu, share = config.cluster, machine.device == "GPU", -(-config.experts.count // machine.workers)
    update = {
        "shards": shards,
        "workers": None,
        "device": "auto" if gpu else "cpu",
        "gpus_per_worker": 1.0 if gpu else 0.0,
        "memory": own.memory if machine.memory is None else str(machine.memory),
        # Stacks are smaller where the largest would leave GPUs idle.
        "experts_at_a_time": own.experts_at_a_time or (share if gpu and share < LARGEST_STACK else None),
    }
    return config.model_copy(update={"cluster": own.model_copy(update=update)})


def not_followed(recipe: RunConfig, proposal: Proposal) -> list[str]:
    """What a recipe sets for itself and the proposed layout has otherwise, in at most one line."""
    ours, theirs, usual = recipe.cluster, proposal.config.cluster, ClusterConfig()
    ignored = [
        f"cluster.{name}={value:g}"
        for name in ("shards", "workers", "gpus_per_worker")
        if (value := getattr(ours, name)) not in (getattr(usual, name), getattr(theirs, name))
    ]
    return [f"  {'not followed':<16} {', '.join(ignored)} of the recipe: --cluster chooses these"] if ignored else []


def storage(config: RunConfig, shape: DataShape) -> dict[str, int]:
    """Bytes that a finished run leaves behind, but for reports: `store`, the last `checkpoint`, and `results`."""
    images, values = config.distill.ipc * shape.classes, math.prod(shape.image)
    row, transform, store = 4 * (values + shape.classes), fitting_cost(config.dataset, shape).stored, 0
    for each in (*config.each_backbone(), *config.each_auxiliary()):
        network = build_network(each.network.for_images(shape.image[0], shape.image[1:], shape.classes), seed=0)
        buffers = sum(buffer.numel() for buffer in float_buffers(network).values())
        snapshot = STORED_BYTES[each.experts.storage] * FlatNetwork(network).count + 4 * buffers
        store += each.experts.count * len(each.kept_epochs) * snapshot + transform
    history = sum(np.dtype(kind).itemsize for kind in columns(IterationRecord).values()) * len(config.weights)
    return {
        "store": store,
        "checkpoint": images * (3 * row + 16) + history * config.distill.iterations,  # set, momentum, set kept
        "results": 2 * images * (row + 8) + (2 if transform <= INLINE_BYTES else 1) * transform,
    }


def measured(proposal: Proposal) -> Machine:
    """The proposal's machine, with rates measured on this one by a few real steps of every kind on made-up images.

    Takes seconds, and up to minutes where steps have to be compiled first; a run that follows here finds them compiled.
    """
    plan, config, cluster = proposal.plans[0], proposal.config, proposal.config.cluster
    device, backbone, image = prepare_device(cluster), config.each_backbone()[0], proposal.shape.image
    spec = backbone.network.for_images(image[0], image[1:], proposal.shape.classes)
    stack, many = experts_at_a_time(backbone, image, spec.classes), max(plan.chunk, config.experts.batch_size)
    networks = [build_network(spec, seed).to(device) for seed in range(stack)]
    images, labels = torch.randn(many, *image, device=device), torch.arange(many, device=device) % spec.classes
    soft, step_size = torch.zeros(plan.chunk, spec.classes, device=device), torch.full((1,), 0.01, device=device)
    synthetic, start = SyntheticSet(images[: plan.chunk], soft, step_size, labels[: plan.chunk]), flatten(networks[0])
    steps = draw_student_steps(plan.chunk, STEPS, plan.chunk, config.distill.augmentation, 0, 0)
    options = StepOptions(cluster.compile, channels_last=cluster.channels_last, precision=cluster.precision)
    functions = StudentStepFunctions(FlatNetwork(networks[0]), options)
    expert = ExpertFunctions(
        networks[0],
        stacked=stack,
        compile_=cluster.compile,
        chunk=chunk_in_cache(networks[0], image, stack) if device.type == "cpu" else None,
        channels_last=cluster.channels_last,
    )
    epochs = REPEATED + 1
    own = config.experts.model_copy(update={"epochs": epochs})
    evaluated = replace(evaluation_schedule(config, 0.01), epochs=epochs, decay_epoch=None)
    state, seeds = ExpertState.initial(networks), range(stack)
    timed: dict[str, tuple[Iterator[object], int]] = {
        "matching": (
            (matching_gradient(functions, start, start + 1, synthetic, steps, chunk=plan.chunk) for _ in range(epochs)),
            STEPS * plan.chunk,
        ),
        "experts": (
            train_experts(expert, images, labels, own, seeds, state),
            stack * many * (2 if own.optimiser == "gsam" else 1),
        ),
        "training": (train(networks[0], images, labels, evaluated, 0), many),
    }
    flop = network_cost(backbone, proposal.shape).flop
    rates = {kind: FORWARD_PASSES[kind] * flop * passes / _seconds(work) for kind, (work, passes) in timed.items()}
    return replace(proposal.machine, rates=rates, basis="measured here")


def _seconds(repeated: Iterator[object]) -> float:
    """Median seconds of some repetitions, after a first one that warms up."""
    found = []
    for _ in range(REPEATED + 1):
        began = time.perf_counter()
        next(repeated)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {show_number(value)}" for name, value in values.items())


def show_number(value: float) -> str:
    """Number with three digits that matter, and thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
