"""How long a run takes on a machine, in which layout a set is distilled soonest, and what a run stores.

Work is counted in image passes: one image, once through one training step. Operations of a pass over the machine's
rate are seconds, and compiling and starting workers come on top. Rates: `measure.py`. Not counted are faults.
Accuracy: benchmarks/README.md. Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from datm_ray.artifact import INLINE_BYTES
from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.networks.parameters import FlatNetwork, float_buffers
from datm_ray.core.networks.registry import build_network
from datm_ray.core.training import PROTOCOLS, validation_protocol
from datm_ray.errors import ConfigError
from datm_ray.methods.state import columns
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.methods.trajectory.iteration import IterationRecord
from datm_ray.planning.fit import DataShape, DistillationPlan, fitting_cost, network_cost, plans_of, total
from datm_ray.planning.machines import Machine
from datm_ray.runtime.devices import uses_gpu
from datm_ray.stages.evaluate import CONTROL_STEP_SIZES, ON_OTHERS
from datm_ray.stages.experts import experts_at_a_time, stacks
from datm_ray.stages.validation import is_apart, validations
from datm_ray.store.trajectories import size_in_words

FORWARD_PASSES = {"matching": 11, "experts": 3, "training": 3, "real": 3, "scoring": 1}
"""Operations of one image pass of each kind, as a multiple of one forward pass. training: on a synthetic set, in small
steps; real: on real data, in whole ones."""
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a parameter in the trajectory store."""
RUN_SECONDS, WORKER_SECONDS = 15.0, 6.0
"""Seconds to start Ray, read images and write the report, and to start one worker for one stage. Measured on one core
by CPU time."""


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

    def compiling(self, kind: str, network: RunConfig) -> float:
        """Seconds in which one worker compiles steps of a network."""
        if not self.config.cluster.compile:
            return 0.0
        return self.machine.compiling[kind] * network_cost(network, self.shape).functions

    @property
    def stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> hours of all GPUs or cores that are held for it, and hours on the clock."""
        config, settings, workers = self.config, self.config.distill, self.machine.workers
        backbones, images, together = config.each_backbone(), settings.ipc * self.shape.classes, config.workers_per_set
        experts, experts_clock, trainers = self._experts()
        compiling = max(sum(self.compiling("matching", backbones[n]) for n in role.backbones) for role in config.roles)
        labelled = config.experts.count * (settings.labels == "soft") + 2 * (settings.initial == "correct")
        choosing = self.seconds("scoring", backbones[0], labelled * images)
        distillation = compiling + choosing + settings.iterations * sum(self.iteration)
        validation = self._validation(distillation - compiling - choosing)
        scored = self._networks_of_a_seed()
        evaluation, scorers = config.evaluate.seeds * sum(scored), min(workers, config.evaluate.seeds * len(scored))
        seconds = {
            "start": (RUN_SECONDS + WORKER_SECONDS * (trainers + together + scorers), RUN_SECONDS + 3 * WORKER_SECONDS),
            "experts": (experts, experts_clock),
            "distillation": (distillation * together, distillation),
            "validation": validation,
            "evaluation": (evaluation, max(*scored, evaluation / scorers)),
        }
        return {name: (self.machine.cores * held / 3600, wall / 3600) for name, (held, wall) in seconds.items()}

    def _validation(self, iterating: float) -> tuple[float, float]:
        """Seconds of all workers for validation, and seconds on the clock after the iterations, which take so long."""
        config, settings = self.config, self.config.distill
        workers, together = self.machine.workers, config.workers_per_set
        schedule = PROTOCOLS[validation_protocol(config.evaluate.protocol)]
        passes, count = schedule.epochs * settings.ipc * self.shape.classes, validations(settings)
        one = settings.validation_seeds * self._trained(config.each_backbone()[0], passes)
        if not is_apart(together, together, workers):
            return count * one * together, count * one
        free = [0.0] * (workers - together) + [iterating] * together
        for number in range(1, count + 1):
            done = min(1.0, number * settings.validate_every / settings.iterations)
            heapq.heapreplace(free, max(free[0], done * iterating) + one)
        return count * one, max(free) - iterating

    @property
    def clock(self) -> dict[str, float]:
        """Stage -> seconds on the clock."""
        return {stage: 3600 * wall for stage, (_, wall) in self.stages.items()}

    def _experts(self) -> tuple[float, float, int]:
        """Seconds of all workers for experts, seconds on the clock, and the most workers that train at a time."""
        config, workers = self.config, self.machine.workers
        experts, clock, trainers = 0.0, 0.0, 1
        for network in (*config.each_backbone(), *config.each_auxiliary()):
            own, stack = network.experts, experts_at_a_time(network, self.shape.image, self.shape.classes)
            passes = own.epochs * self._split[0] * (2 if own.optimiser == "gsam" else 1)
            one, compiling = self.seconds("experts", network, passes), self.compiling("experts", network)
            following = 1 if network.cluster.experts_at_a_time else workers
            least = 1 if uses_gpu(network.cluster) else 2
            sizes = sorted(map(len, stacks(range(own.count), stack, own.count, following, least)), reverse=True)
            at_once = min(workers, len(sizes))
            experts += own.count * one + at_once * compiling
            trainers = max(trainers, at_once)
            clock += min(own.count, sum(sizes[::workers])) * one + compiling
        return experts, clock, trainers

    @property
    def _split(self) -> tuple[float, float]:
        """Images that are trained on, and images set aside for validation."""
        held_out = self.shape.training_images * self.config.dataset.validation
        return self.shape.training_images - held_out, held_out

    def _trained(self, network: RunConfig, passes: float, kind: str = "training") -> float:
        """Seconds to train a network for so many passes and score it on validation images."""
        return self.seconds(kind, network, passes) + self.seconds("scoring", network, self._split[1])

    def _networks_of_a_seed(self) -> list[float]:
        """Seconds of each network of the tables; a row without a learned step size tries several."""
        settings, backbone, tried = self.config.evaluate, self.config.each_backbone()[0], len(CONTROL_STEP_SIZES)
        passes = PROTOCOLS[settings.protocol].epochs * self.config.distill.ipc * self.shape.classes
        learned = 1 if settings.optimiser == "sgd" else tried
        trials = [tried, tried, learned, *([tried + 1, learned, tried] if settings.fair else [])]
        seconds = [count * self._trained(backbone, passes) for count in trials]
        if settings.full:
            seconds.append(tried * self._trained(backbone, settings.real_epochs * self._split[0], "real"))
        for network in self.config.scored_networks:
            other = backbone.model_copy(update={"network": network})
            seconds += [count * self._trained(other, passes) for count in (tried, tried + 1)[: len(ON_OTHERS)]]
        tested = self.seconds("scoring", backbone, self.shape.test_images)
        return [each + tested for each in seconds]

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
        device, image = machine.device.replace("core", "CPU"), "x".join(map(str, shape.image))
        held, clock = {name: 3600 * hours for name, (hours, _) in stages.items()}, self.clock
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
            f"{device} time": f"{_listed(held)}; {machine.basis}" if machine.basis else NO_HOURS,
            "storage": ", ".join(f"{name} {size_in_words(size)}" for name, size in kept.items()),
        }
        fitting = fitting_cost(config.dataset, shape)
        if fitting.size:
            rows["fitting zca"] = f"{fitting}, once, by the process that starts the workers"
        if suggested:
            rows["layout"] = f"{self.settings()}: {config.workers_per_set} of {machine.workers} workers distil"
        if verbose and machine.basis:
            rows["on the clock"] = _listed(clock)
        if verbose:
            size = size_in_words(sum(each.network_bytes for each in self.plans))
            computing, sums = self.iteration
            rows["an iteration"] = f"{computing:.3g} s computing, {sums:.3g} s sums; a shard sums {size}"
        worst = max(self.plans, key=lambda each: total(each.parts))
        times = f"{show_time(sum(held.values()))} of {device}s, {show_time(sum(clock.values()))} on the clock"
        about = f"about {times}, " if machine.basis else ""
        found = [
            f"{config.name}: memory {worst.memory} a worker, {about}{size_in_words(sum(kept.values()))} of storage"
        ]
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


NO_HOURS = "unknown: not measured. Give the speed as tflops= or gflops= in --cluster, or use --measure where it is"


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
    own, gpu = config.cluster, machine.device == "GPU"
    update = {
        "shards": shards,
        "workers": None,
        "device": "auto" if gpu else "cpu",
        "gpus_per_worker": 1.0 if gpu else 0.0,
        "memory": own.memory if machine.memory is None else str(machine.memory),
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


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {show_time(value)}" for name, value in seconds.items())


def show_time(seconds: float) -> str:
    """Duration in at most two units, such as "95 s", "12 min", "1 h 05 min" or "3 days 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24:,} days {hours % 24} h"
