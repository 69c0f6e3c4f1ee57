"""Estimates of the time that a run takes on a machine, and of the bytes that it stores.

Times come from one table: the tasks of every stage, with the work of each (`work.py`). A machine needs some seconds for
each operation (`machines.py`, `measure.py`), and some to compile steps. Time lost to faults is not counted.
Accuracy: benchmarks/README.md. Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datm_ray.artifact import INLINE_BYTES
from datm_ray.config import RunConfig
from datm_ray.core.training.loop import scoring_schedule
from datm_ray.planning import work
from datm_ray.planning.machines import READING_OPERATIONS, SPEED, Machine
from datm_ray.planning.work import Row, Work
from datm_ray.shape import DataShape, fitting_cost, network_cost
from datm_ray.stages.distill.validation import validations
from datm_ray.stages.evaluate.memory import described_step, gpu_bytes
from datm_ray.stages.evaluate.rows import scored_rows
from datm_ray.stages.experts.train import described_experts, divided, experts_at_a_time, stored_bytes
from datm_ray.stages.labels import planned_labels
from datm_ray.stages.methods.base import Outlook
from datm_ray.stages.methods.distribution import SLOW_READING
from datm_ray.stages.methods.memory import DistillationPlan, held_images
from datm_ray.stages.methods.registry import method_of, trained_networks
from datm_ray.stages.prior import described_prior, is_trained
from datm_ray.store.labels import LabelInfo
from datm_ray.words import counted, data_size, duration

RUN_SECONDS, WORKER_SECONDS = 15.0, 6.0
"""RUN_SECONDS: seconds that a run takes to start Ray, read images and write the report. WORKER_SECONDS: seconds to
start one worker for a stage. Both are CPU times, as measured, and count as time on the clock too."""
SET_FILES = 8
"""Estimated size of all files of a synthetic set, as a multiple of the set's size: the first and the final set; in the
checkpoint, the set, its momentum, its moving average and the set chosen so far; and two for histories and latents."""
NO_HOURS = "unknown: not measured. Give the speed as tflops= or gflops= in --cluster, or use --measure where it is"


@dataclass(frozen=True)
class Proposal:
    """A recipe, the layout of its workers and a machine, with estimates of memory, time and storage.

    The layout, such as the number of shards, says how workers divide the distillation.
    """

    config: RunConfig
    """The recipe, whose `cluster` section has the layout."""
    shape: DataShape
    plans: list[DistillationPlan]
    """Memory plans of the workers: one for each backbone, in the recipe's order, then those of workers that compute
    MetaDD alone."""
    machine: Machine
    replaced: Sequence[str] | None = None
    """Recipe settings, such as "cluster.shards=4", that a suggested layout replaces; `None` if none is suggested."""

    @functools.cached_property
    def tasks(self) -> dict[str, list[Work]]:
        """Stage, such as "experts" -> the work of each of its tasks."""
        config, shape, is_in_pieces = self.config, self.shape, self._pieces > 0
        has_validations = not is_in_pieces and method_of(config).iterations(config) > 0
        validated = validations(config.distill) if has_validations else 0
        tasks = {
            "experts": self._experts(),
            "distillation": [work.distillation(config, shape, self.seconds)] * (self._pieces or 1),
            "validation": [work.validation(config, shape)] * validated,
        }
        if self._labels:
            parts = work.divided_epochs(range(self._labels.keep), self.machine.workers)
            tasks["labels"] = [work.labels(config, shape, len(part)) for part in parts]
        rows = [Row(config, row, network, shape) for row, network in scored_rows(config)]
        shares = zip(rows, work.divided_rows(rows, self.machine.workers), strict=True)
        return tasks | {"evaluation": [work.evaluation(row, len(part)) for row, parts in shares for part in parts]}

    def _experts(self) -> list[Work]:
        """Work of each task of the stage "experts": train scoring networks and experts, order images, train a prior."""
        tasks, shape, trained = list[Work](), self.shape, trained_networks(self.config)
        scoring: list[RunConfig] = [run for each in trained if (run := each.scoring_run)]
        for networks in (scoring, trained):
            for own in networks:
                size = experts_at_a_time(own, shape.image, shape.classes)
                stacks = divided(own, range(own.experts.count), size, self.machine.workers, len(networks))
                tasks += [work.experts(own, shape, len(stack)) for stack in stacks]
        tasks += [work.order(own, shape) for own in scoring]
        return [*tasks, work.prior(self.config, shape)] if is_trained(self.config) else tasks

    def seconds(self, task: Work) -> float:
        """Estimated seconds that one worker takes for a task, without compiling.

        A GPU computes while the CPUs beside it read streamed images; a core does one after the other.
        """
        parts = [(kind, self.machine.seconds[kind] * operations) for kind, _, operations in task]
        read = sum(seconds for kind, seconds in parts if kind == "reading")
        rest = sum(seconds for kind, seconds in parts if kind != "reading")
        return max(read, rest) if self.machine.device == "GPU" else read + rest

    def compiling(self, kind: str, network: RunConfig) -> float:
        """Estimated seconds in which a worker compiles a network's steps of a kind of work; 0 if uncompiled."""
        is_compiled = self.config.cluster.compile and (kind == "recovery" or network.network.norm != "batch")
        each = self.machine.compiling.get(kind, 0.0) if is_compiled else 0.0
        return each * network_cost(network, self.shape).functions

    def _scheduled(self, tasks: Sequence[Work], together: int = 1) -> tuple[float, float]:
        """Estimated seconds that workers work, summed over all, and seconds on the clock until the last task ends.

        Each task is run by a group of `together` workers. A free group takes the longest task that is left. It compiles
        the steps of a network before its first task with these steps.
        """
        groups = [(0.0, number, frozenset[Any]()) for number in range(max(1, self.machine.workers // together))]
        for task in sorted(tasks, key=self.seconds, reverse=True):
            busy, number, known = groups[0]
            steps = {(kind, own.network): self.compiling(kind, own) for kind, own, _ in task}
            busy += self.seconds(task) + sum(steps[step] for step in steps.keys() - known)
            heapq.heapreplace(groups, (busy, number, known | steps.keys()))
        return together * sum(busy for busy, *_ in groups), max(busy for busy, *_ in groups)

    @property
    def iteration(self) -> tuple[float, float]:
        """Estimated seconds of one distillation iteration on the slowest worker: computing, and sums over workers."""
        shards, roles, machine = self.config.cluster.shards, self.config.roles, self.machine
        demands = [self.plans[number].demand for number in roles[0].backbones]
        sums = sum(machine.sum_seconds(each.summed, each.sums, shards) for each in demands)
        computing = max(self.seconds(each) for each in work.iterations(self.config, self.shape))
        held = held_images(self.plans[0].demand, self.config, self.shape)
        return computing, sums + machine.sum_seconds(held * self.shape.row, 4, len(roles))

    @functools.cached_property
    def stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> estimated hours that GPUs or cores work for it, summed over all, and hours on the clock."""
        tasks, workers, together = self.tasks, self.machine.workers, self.config.workers_per_set
        started = min(workers, len(tasks["experts"])) + together + min(workers, len(tasks["evaluation"]))
        seconds = {"start": (RUN_SECONDS + WORKER_SECONDS * started, RUN_SECONDS + 3 * WORKER_SECONDS)}
        seconds |= {stage: self._scheduled(own) for stage, own in tasks.items()}
        computing, sums = (method_of(self.config).iterations(self.config) * each for each in self.iteration)
        held, clock = self._scheduled(tasks["distillation"], together)
        seconds["distillation"] = (held + together * sums, clock + sums)
        if validated := tasks["validation"]:  # workers that do not distil validate while others iterate
            meanwhile = int(max(0, workers - together) * (computing + sums) / self.seconds(validated[0]))
            left = validated[min(meanwhile, len(validated) - 1) :]
            seconds["validation"] = (seconds["validation"][0], self._scheduled(left)[1])
        return {stage: (self.machine.cores * held / 3600, clock / 3600) for stage, (held, clock) in seconds.items()}

    @property
    def clock(self) -> dict[str, float]:
        """Stage, such as "experts" -> estimated seconds on the clock."""
        return {stage: 3600 * clock for stage, (_, clock) in self.stages.items()}

    @property
    def _pieces(self) -> int:
        """Number of pieces (parts of the set) that single workers make; 0 if the workers make the set together."""
        return len(method_of(self.config).pieces(self.config, self.shape.classes))

    @functools.cached_property
    def _labels(self) -> LabelInfo | None:
        """Settings and planned size of the store of the set's labels; `None` if the recipe stores no labels."""
        return planned_labels(self.config, self.shape) if self.config.evaluate.stores_labels else None

    @property
    def _reading(self) -> str:
        """Text on the streamed images that the run reads from files: how many, and seconds for each; "" for none."""
        together = {"distillation": self.config.workers_per_set}
        read = sum(
            together.get(stage, 1) * operations / READING_OPERATIONS
            for stage, tasks in self.tasks.items()
            for task in tasks
            for kind, _, operations in task
            if kind == "reading"
        )
        each, demand = 1e3 * READING_OPERATIONS * self.machine.seconds["reading"], self.plans[0].demand
        every = f"; {demand.read:,} in every iteration of a worker: {SLOW_READING}" if demand.read else ""
        return f"{read:,.0f} images from their files, about {each:.2g} ms each in a worker{every}" if read else ""

    @property
    def storage(self) -> dict[str, int]:
        """Estimated bytes of a finished run's files, without reports.

        "store" counts experts, scoring networks and their transforms; "labels" stored labels, if any; "set" all files
        of the synthetic set."""
        config, shape = self.config, self.shape
        transform, store = fitting_cost(config.dataset, shape).stored, 0
        for each in trained_networks(config):
            store += transform + sum(stored_bytes(run, shape) for run in (each, each.scoring_run) if run)
        labels = {"labels": self._labels.planned_bytes} if self._labels else {}
        copies = SET_FILES * shape.synthetic(config) * shape.row
        return {"store": store, **labels, "set": copies + (2 if transform <= INLINE_BYTES else 1) * transform}

    @property
    def outlook(self) -> Outlook | None:
        """Forecast of the method for the recipe, such as how far experts move; `None` if the method makes none."""
        return method_of(self.config).outlook(self.config, self.shape.trained(self.config.dataset))

    def to_json(self) -> dict[str, Any]:
        """Estimates as plain data for JSON. "hours" and "clock_hours" are `None` if no speed is known."""
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
            "memory": [each.to_json() for each in self.plans],
            "evaluation_gpu_bytes": self.evaluation_bytes,
            "not_followed": list(self.replaced or ()),
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, verbose: bool = False) -> list[str]:
        """Estimates as text for people. `verbose` adds details of time and memory."""
        machine, storage, outlook = self.machine, self.storage, self.outlook
        config, shape, fitting = self.config, self.shape, fitting_cost(self.config.dataset, self.shape)
        held, clock = ({stage: 3600 * hours[place] for stage, hours in self.stages.items()} for place in (0, 1))
        (computing, sums), summed = self.iteration, sum(each.demand.summed for each in self.plans if each.chunk)
        device, seeds = machine.device.replace("core", "CPU"), config.evaluate.seeds
        epochs = scoring_schedule(config.evaluate, 1.0).epochs
        of_gpu = described_step(config, shape, None if self.replaced is None else machine.memory or math.inf)
        rows = {
            "data": str(shape),
            "fitting zca": fitting.size and f"{fitting}, once, by the process that starts the workers",
            "experts": "; ".join(map(described_experts, trained_networks(config))) or "none needed",
            "prior": described_prior(config),
            "distillation": method_of(config).described(config, shape.synthetic(config), self.plans[0].chunk),
            **({outlook.title: "; ".join(outlook.lines())} if outlook else {}),
            "evaluation": f"{counted(seeds, 'network')} a row, {counted(epochs, 'epoch')}{of_gpu}",
            "reading": self._reading,
            f"{device} time": "; ".join(filter(None, (_listed(held), machine.basis, machine.network)))
            if machine.basis
            else NO_HOURS,
            "storage": ", ".join(f"{name} {data_size(size)}" for name, size in storage.items()),
            "layout": self._layout,
            "on the clock": verbose and machine.basis and _listed(clock),
            "an iteration": verbose
            and f"{computing:.3g} s computing, {sums:.3g} s sums; a shard sums {data_size(summed)}",
        }
        times = f"{duration(sum(held.values()))} of {device}s, {duration(sum(clock.values()))} on the clock"
        about, worst = f"about {times}, " if machine.basis else "", max(self.plans, key=lambda each: each.total)
        return [
            f"{config.name}: memory {worst} a worker, {about}{data_size(sum(storage.values()))} of storage",
            *(f"  {label:<16} {value}" for label, value in rows.items() if value),
            *(line for each in self.plans if verbose for line in each.lines()),
        ]

    @property
    def evaluation_bytes(self) -> int | None:
        """Estimated bytes of GPU memory in a step that trains a scored network on the set; `None` if CPUs train it."""
        return gpu_bytes(self.config, self.shape)

    @property
    def _layout(self) -> str:
        """Text with the command-line options that choose the suggested layout; "" if the layout is the recipe's own."""
        if self.replaced is None:
            return ""
        names, cluster = ("shards", "gpus_per_worker", "experts_at_a_time", "memory"), self.config.cluster
        options = [f"--set cluster.{name}={value}" for name in names if (value := getattr(cluster, name)) is not None]
        distilling = min(self._pieces, self.machine.workers) or self.config.workers_per_set
        parts, machine = [f"{' '.join(options)}: {distilling} of {self.machine.workers} workers distil"], self.machine
        if not machine.basis:
            parts[0] += f", for an assumed {SPEED[machine.device] / 1e12:g} TFLOP/s"
            parts += [machine.network] * bool(machine.network)
        parts += [f"not followed: {', '.join(self.replaced)} of the recipe"] * bool(self.replaced)
        return "; ".join(parts)


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if value)
