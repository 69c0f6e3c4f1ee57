"""Time that a run takes on a machine, and bytes that it stores.

Work is counted in image passes: one image, once through one training step. A machine needs some seconds for each
(`machines.py`, `measure.py`). Time to compile and to start workers is added. Faults are not counted. Accuracy:
benchmarks/README.md. Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from datm_ray.artifact import INLINE_BYTES
from datm_ray.config import RunConfig
from datm_ray.core.training import PROTOCOLS, scoring_schedule, validation_protocol
from datm_ray.methods.state import columns
from datm_ray.planning.fit import DistillationPlan
from datm_ray.planning.machines import Machine
from datm_ray.planning.shape import DataShape, fitting_cost, network_cost
from datm_ray.runtime.devices import uses_gpu
from datm_ray.stages.evaluate import is_taught, scored_rows, seeds_of_tasks, training_of
from datm_ray.stages.experts import experts_at_a_time, stacks
from datm_ray.stages.labels import kept_labels
from datm_ray.stages.method import Outlook
from datm_ray.stages.registry import method_of, teacher_of, trained_networks
from datm_ray.stages.validation import is_apart, validations
from datm_ray.store.labels import LabelInfo
from datm_ray.store.trajectories import size_in_words

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a parameter in the trajectory store."""
RUN_SECONDS, WORKER_SECONDS = 15.0, 6.0
"""Seconds to start Ray, read images and write the report, and to start one worker for one stage. Measured on one core
by CPU time."""
NO_HOURS = "unknown: not measured. Give the speed as tflops= or gflops= in --cluster, or use --measure where it is"


@dataclass(frozen=True)
class Proposal:
    """A recipe in a layout on a machine, with estimates of its memory, time and storage."""

    config: RunConfig
    """The recipe, whose `cluster` section has the layout."""
    shape: DataShape
    plans: list[DistillationPlan]
    """Memory plans of the workers: first one plan for each network, in the networks' order."""
    machine: Machine

    def seconds(self, kind: str, network: RunConfig, passes: float) -> float:
        """Seconds that one worker takes for `passes` image passes through a network."""
        return passes * network_cost(network, self.shape).flop * self.machine.seconds[kind]

    def compiling(self, kind: str, network: RunConfig) -> float:
        """Seconds in which one worker compiles steps of a network."""
        is_compiled = self.config.cluster.compile and network.network.norm != "batch"
        each = self.machine.compiling.get(kind, 0.0) if is_compiled else 0.0
        return each * network_cost(network, self.shape).functions

    @property
    def iteration(self) -> tuple[float, float]:
        """Seconds of one iteration: computing on the slowest worker, and sums over workers."""
        config, shards, machine = self.config, self.config.cluster.shards, self.machine
        networks, whole = config.each_backbone(), self.shape.synthetic(config, shards)
        held = next((plan.demand.held for plan in self.plans if plan.demand and plan.demand.held), whole)
        looking, share = [networks[0], *config.each_auxiliary()], config.metadd.share if config.metadd else 0.0
        computing = summing = 0.0
        for role in config.roles:
            own = [self.plans[number] for number in role.backbones]
            worked = zip(role.backbones, own, strict=True)
            passes = [(kind, networks[number], each) for number, plan in worked for kind, each in plan.passes.items()]
            passes += [("training", looking[number], share * held) for number in role.meta_networks]
            computing = max(computing, sum(self.seconds(*each) for each in passes))
            sums = (machine.sum_seconds(each.summed, each.sums, shards) for plan in own if (each := plan.demand))
            summing = max(summing, sum(sums))
        return computing, summing + machine.sum_seconds(held * self.shape.row, 4, len(config.roles))

    @property
    def outlook(self) -> Outlook | None:
        """Facts that the method tells about the recipe; `None` if there is nothing to tell."""
        return method_of(self.config).outlook(self.config, round(self.shape.training_images - self._held_out))

    @functools.cached_property
    def stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> hours of all GPUs or cores that are held for it, and hours on the clock."""
        config, workers = self.config, self.machine.workers
        backbones, together = config.each_backbone(), config.workers_per_set
        experts, scored = self._experts(), self._scored()
        started = min(workers, len(experts)) + together + min(workers, len(scored))
        compiling = max(
            sum(self.compiling(kind, backbones[n]) for n in role.backbones for kind in self.plans[n].passes)
            for role in config.roles
        )
        method, pieces, training = method_of(config), self._pieces, round(self.shape.training_images - self._held_out)
        passes = method.choosing(config, self.shape.classes, training)
        choosing = sum(self.seconds(kind, backbones[0], count) for kind, count in passes.items()) / max(1, pieces)
        iterating = method.iterations(config) * sum(self.iteration)
        distillation = compiling + choosing + iterating
        seconds = {
            "start": (RUN_SECONDS + WORKER_SECONDS * started, RUN_SECONDS + 3 * WORKER_SECONDS),
            "experts": self._spread(experts),
            "distillation": (distillation * together * max(1, pieces), distillation * -(-max(1, pieces) // workers)),
            "validation": (0.0, 0.0) if pieces or not iterating else self._validation(iterating),
            **({"labels": self._spread([labelling])} if (labelling := self._labelling) else {}),
            "evaluation": self._spread(scored),
        }
        return {name: (self.machine.cores * held / 3600, wall / 3600) for name, (held, wall) in seconds.items()}

    @property
    def _pieces(self) -> int:
        """Pieces in which workers make the set, one each; 0 if workers make it together."""
        return len(method_of(self.config).pieces(self.config, self.shape.classes))

    @property
    def distilling(self) -> int:
        """Workers that distil at the same time."""
        return min(self._pieces, self.machine.workers) or self.config.workers_per_set

    @property
    def clock(self) -> dict[str, float]:
        """Stage -> seconds on the clock."""
        return {stage: 3600 * wall for stage, (_, wall) in self.stages.items()}

    @functools.cached_property
    def _labels(self) -> LabelInfo | None:
        """Facts about the set's label store; `None` if the recipe stores no labels."""
        config, images = self.config, self.shape.synthetic(self.config)
        if config.evaluate.labels != "stored":
            return None
        epochs, (_, height, width) = scoring_schedule(config.evaluate, 1.0).epochs, self.shape.image
        classes, keep, top = self.shape.classes, min(kept_labels(config), epochs), config.evaluate.top_logits
        top = None if top is None or top >= classes else top
        return LabelInfo("", "", images, classes, (height, width), epochs, keep, config.seed, top)

    @property
    def _labelling(self) -> float:
        """Seconds in which one worker labels the set for all stored epochs."""
        passes = self._labels.keep * self._labels.images if self._labels else 0
        return self.seconds("scoring", teacher_of(self.config), passes) if passes else 0.0

    def _spread(self, tasks: list[float]) -> tuple[float, float]:
        """Seconds of all tasks, and seconds on the clock if free workers take them, the longest first."""
        busy = [0.0] * self.machine.workers
        for seconds in sorted(tasks, reverse=True):
            heapq.heapreplace(busy, busy[0] + seconds)
        return sum(tasks), max(busy)

    def _experts(self) -> list[float]:
        """Seconds of each stack of experts. A worker compiles before its first stack of a network."""
        tasks, workers = [], self.machine.workers
        for network in trained_networks(self.config):
            own, stack = network.experts, experts_at_a_time(network, self.shape.image, self.shape.classes)
            passes = own.epochs * (self.shape.training_images - self._held_out) * (2 if own.optimiser == "gsam" else 1)
            one, compiling = self.seconds("experts", network, passes), self.compiling("experts", network)
            following, least = (
                1 if network.cluster.experts_at_a_time else workers,
                1 if uses_gpu(network.cluster) else 2,
            )
            found = stacks(range(own.count), stack, own.count, following, least)
            tasks += [len(each) * one + compiling * (number < workers) for number, each in enumerate(found)]
        return tasks

    def _validation(self, iterating: float) -> tuple[float, float]:
        """Seconds of all workers for validation, and its seconds on the clock.

        Args:
            iterating: seconds of all iterations, during which free workers validate.
        """
        config, workers, together = self.config, self.machine.workers, self.config.workers_per_set
        epochs, count = PROTOCOLS[validation_protocol(config.evaluate.protocol)].epochs, validations(config.distill)
        passes = config.distill.validation_seeds * epochs * self.shape.synthetic(config)
        one = self._trained("training", config.each_backbone()[0], passes, config.distill.validation_seeds)
        if not is_apart(together, together, workers):
            return count * one * together, count * one
        meanwhile = min(max(0, count - 1), int(max(0, workers - together) * iterating / one))
        return count * one, one * -(-(count - meanwhile) // workers)

    def _scored(self) -> list[float]:
        """Seconds of each task of the evaluation. Networks that are trained together are compiled."""
        config, shape, workers = self.config, self.shape, self.machine.workers
        backbone, rows, tasks = config.each_backbone()[0], scored_rows(config), list[float]()
        sizes = {"training": shape.synthetic(config), "real": round(shape.training_images - self._held_out)}
        for row, network in rows:
            count, schedule = training_of(config, row, network)
            alone, other = "real" if row == "full" else "training", network or backbone.network
            trained, images = backbone.model_copy(update={"network": other}), sizes[alone]
            spec = other.for_images(shape.image[0], shape.image[1:], shape.classes)
            for seeds in map(len, seeds_of_tasks(config, row, spec, images, -(-workers // len(rows)))):
                kind, passes = "experts" if seeds > 1 else alone, seeds * count * schedule.epochs * images
                compiling = self.compiling("experts", trained) * (seeds > 1 and len(tasks) < workers)
                tested = self.seconds("scoring", backbone, seeds * shape.test_images)
                taught = self.seconds("scoring", teacher_of(config), passes) if is_taught(config, row) else 0.0
                tasks.append(compiling + self._trained(kind, trained, passes, seeds * count) + taught + tested)
        return tasks

    def _trained(self, kind: str, network: RunConfig, passes: float, count: int) -> float:
        """Seconds to train `count` networks with `passes` image passes in all, and score them on validation images."""
        return self.seconds(kind, network, passes) + self.seconds("scoring", network, count * self._held_out)

    @property
    def _held_out(self) -> float:
        """Images set aside for validation."""
        return self.shape.training_images * self.config.dataset.validation

    @property
    def storage(self) -> dict[str, int]:
        """Bytes that a finished run stores, by part: store, checkpoint, labels if any, and results without reports."""
        config, images, row = self.config, self.shape.synthetic(self.config), self.shape.row
        transform, store = fitting_cost(config.dataset, self.shape).stored, 0
        for each in trained_networks(config):
            snapshot = STORED_BYTES[each.experts.storage] * network_cost(each, self.shape).parameters
            store += each.experts.count * len(each.kept_epochs) * snapshot + transform
        method = method_of(config)
        kinds = columns(method.state.record).values()
        history = sum(np.dtype(kind).itemsize for kind in kinds) * len(config.weights)
        return {
            "store": store,
            "checkpoint": images * (3 * row + 16) + history * method.iterations(config),  # set, momentum, set kept
            **({"labels": self._labels.planned_bytes} if self._labels else {}),
            "results": 2 * images * (row + 8) + (2 if transform <= INLINE_BYTES else 1) * transform,
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """Estimates as plain data. Hours are `None` if no speed is known."""
        config, machine, outlook = self.config, self.machine, self.outlook
        held, clock = ({name: hours[place] for name, hours in self.stages.items()} for place in (0, 1))
        return {
            "name": config.name,
            "data": dataclasses.asdict(self.shape),
            "device": machine.device,
            "workers": machine.workers,
            "speed": machine.basis,
            "hours": held if machine.basis else None,
            "clock_hours": clock if machine.basis else None,
            "distance": outlook.to_json() if outlook else None,
            "iteration_seconds": dict(zip(("computing", "sums"), self.iteration, strict=True)),
            "storage_bytes": self.storage,
            "workers_per_set": config.workers_per_set,
            "cluster": config.cluster.model_dump(include={"shards", "gpus_per_worker", "experts_at_a_time"}),
            "memory": [
                {
                    "worker": each.name,
                    "bytes": each.total,
                    "limit_bytes": None if math.isinf(each.budget) else each.budget,
                    "parts": each.parts,
                }
                for each in self.plans
            ],
        }

    def lines(self, *, suggested: bool = False, verbose: bool = False) -> list[str]:
        """Estimates as text for people.

        Args:
            suggested: True to show the layout, which was chosen for a described cluster.
            verbose: True to show details of time and memory.
        """
        config, shape, machine, plan = self.config, self.shape, self.machine, self.plans[0]
        device, image = machine.device.replace("core", "CPU"), "x".join(map(str, shape.image))
        kept, outlook = self.storage, self.outlook
        held, clock = {name: 3600 * hours for name, (hours, _) in self.stages.items()}, self.clock
        trained = (
            f"{each.experts.count:,} {each.network.architecture}, {each.experts.epochs:,} epochs"
            for each in trained_networks(config)
        )
        fitting, (computing, sums) = fitting_cost(config.dataset, shape), self.iteration
        summed = size_in_words(sum(each.demand.summed for each in self.plans if each.demand))
        worst = max(self.plans, key=lambda each: each.total)
        rows = {
            "data": f"{shape.training_images:,} training images of {image} in {shape.classes:,} classes: "
            f"{size_in_words(shape.bytes)}, shared by the workers of a machine",
            "experts": "; ".join(trained) or "none needed",
            "distillation": method_of(config).described(config, shape.synthetic(config), plan.chunk),
            **({outlook.title: "; ".join(outlook.lines())} if outlook else {}),
            "evaluation": f"{config.evaluate.seeds:,} networks a row, "
            f"{scoring_schedule(config.evaluate, 1.0).epochs:,} epochs",
            f"{device} time": f"{_listed(held)}; {machine.basis}" if machine.basis else NO_HOURS,
            "storage": ", ".join(f"{name} {size_in_words(size)}" for name, size in kept.items()),
            "fitting zca": fitting.size and f"{fitting}, once, by the process that starts the workers",
            "layout": suggested and f"{self.settings()}: {self.distilling} of {machine.workers} workers distil",
            "on the clock": verbose and machine.basis and _listed(clock),
            "an iteration": verbose and f"{computing:.3g} s computing, {sums:.3g} s sums; a shard sums {summed}",
        }
        times = f"{show_time(sum(held.values()))} of {device}s, {show_time(sum(clock.values()))} on the clock"
        about = f"about {times}, " if machine.basis else ""
        return [
            f"{config.name}: memory {worst.memory} a worker, {about}{size_in_words(sum(kept.values()))} of storage",
            *(f"  {label:<16} {value}" for label, value in rows.items() if value),
            *(line for each in self.plans if verbose for line in each.lines()),
        ]

    def settings(self) -> str:
        """Options that ask for the layout on the command line."""
        cluster, size = self.config.cluster, self.machine.memory
        options = [f"--set cluster.shards={cluster.shards}"]
        options += [f"--set cluster.gpus_per_worker={cluster.gpus_per_worker:g}"] if cluster.gpus_per_worker else []
        options += [f"--set cluster.experts_at_a_time={cluster.experts_at_a_time}"] if cluster.experts_at_a_time else []
        options += [f"--memory {size if size % 2**30 else f'{size // 2**30}GiB'}"] if size is not None else []
        return " ".join(options)


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {show_time(value)}" for name, value in seconds.items() if value)


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
