"""Amount of work of every kind of task, from which plans estimate times, and runs take the weights of their tasks.

A task's work is a list of parts. Each part counts operations of forward passes; `FORWARD_PASSES` says how long they
take. Tests: tests/planning/test_work.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datm_ray.config import NetworkConfig, Role, RunConfig
from datm_ray.core.networks.stacked import LARGEST_STACK, cost_and_stacking
from datm_ray.core.training.loop import STEP_OVERHEAD, Schedule, stack_sizes, work_of_training, would_gain_together
from datm_ray.planning.machines import FORWARD_PASSES, READING_OPERATIONS
from datm_ray.runtime.machine.devices import uses_gpu
from datm_ray.shape import DataShape, network_cost, prior_cost
from datm_ray.stages.distill.validation import validation_schedule
from datm_ray.stages.evaluate.rows import asks_teacher, is_taught, networks_alike, training_of
from datm_ray.stages.methods.memory import held_images
from datm_ray.stages.methods.registry import method_of, teacher_of


class WorkPart(NamedTuple):
    """Part of a task's work: operations of one kind."""

    kind: str
    """Kind of work, a key of `FORWARD_PASSES`."""
    run: RunConfig
    """Run whose `network` computes this part."""
    operations: float
    """Floating-point operations of all forward passes; for other work, as many as would take its time."""


Work = list[WorkPart]


def weight(work: Sequence[WorkPart]) -> float:
    """Estimated time of a task's work, at least 1, in a relative unit: the time of one operation in a student step."""
    return max(1.0, sum(FORWARD_PASSES[kind] * operations for kind, _, operations in work))


def passes(kind: str, run: RunConfig, shape: DataShape, images: float) -> WorkPart:
    """Work of kind `kind` in which `images` images pass through the run's network."""
    return WorkPart(kind, run, images * network_cost(run, shape).flop)


def reading(run: RunConfig, shape: DataShape, images: float) -> Work:
    """Work of reading `images` images from their files; empty unless images are streamed."""
    return [WorkPart("reading", run, images * READING_OPERATIONS)] if shape.is_streamed and images else []


def experts(run: RunConfig, shape: DataShape, count: int) -> Work:
    """Work of training a stack of `count` experts of a run with one network."""
    settings, images = run.experts, count * shape.trained(run.dataset)
    read = reading(run, shape, settings.epochs * settings.share_seen(range(settings.epochs)) * images)
    return [passes("experts", run, shape, settings.image_passes * images), *read]


def order(scoring: RunConfig, shape: DataShape) -> Work:
    """Work of scoring the training images, for a curriculum, with all networks of `scoring`, a run's `scoring_run`."""
    images = scoring.experts.count * shape.trained(scoring.dataset)
    return [passes("scoring", scoring, shape, images), *reading(scoring, shape, images)]


def prior(run: RunConfig, shape: DataShape) -> Work:
    """Work of training a run's prior, whose encoder is about as large as its decoder."""
    assert run.prior is not None
    flop, images = prior_cost(run.prior, shape.image)[0].flop, run.prior.epochs * shape.trained(run.dataset)
    return [WorkPart("training", run, 2 * flop * images), *reading(run, shape, images)]


def iterations(run: RunConfig, shape: DataShape) -> list[Work]:
    """Work of one worker in one iteration, for each role: the backbones and MetaDD networks that the worker computes.

    Workers of a role have different classes. The work is that of the worker with the most classes.
    """
    networks, method, shards = run.each_backbone(), method_of(run), run.cluster.shards
    demands = [method.demand(run, shape.classes, shards, network_cost(each, shape)) for each in networks]
    held = held_images(demands[0], run, shape)
    seen = [networks[0], *run.each_auxiliary()]
    decoding = 0 if run.prior is None else prior_cost(run.prior, shape.image)[0].flop

    def of_role(role: Role) -> Work:
        share = run.metadd.share if run.metadd and run.metadd.has_weight else 0.0
        work = [passes("training", seen[number], shape, share * held) for number in role.meta_networks]
        for number in role.backbones:
            work += [passes(kind, networks[number], shape, each) for kind, each in demands[number].passes.items()]
            work += reading(networks[number], shape, demands[number].read)
        decoded = held * (len(role.backbones) + bool(role.meta_networks))
        return [*work, WorkPart("training", run, decoding * decoded)]

    return [of_role(role) for role in run.roles]


def distillation(run: RunConfig, shape: DataShape, time: Callable[[Work], float] = weight) -> Work:
    """Work of one worker to distil a set: choosing the first images, and all iterations.

    If single workers make pieces of the set, this is the work of one piece. If workers make the set together, it is
    the work of the slowest worker, the one with the largest `time` of an iteration.
    """
    method, first = method_of(run), run.each_backbone()[0]
    count, pieces = method.iterations(run), len(method.pieces(run, shape.classes)) or 1
    chosen = dict(method.choosing(run, shape.classes, shape.trained(run.dataset)))
    read = reading(first, shape, chosen.pop("reading", 0) / pieces)
    changing = [WorkPart(kind, own, count * each) for kind, own, each in max(iterations(run, shape), key=time)]
    return [*changing, *(passes(kind, first, shape, each / pieces) for kind, each in chosen.items()), *read]


def _training(
    kind: str, run: RunConfig, shape: DataShape, schedule: Schedule, images: int, networks: int, stacks: int
) -> Work:
    """Work of training `networks` networks on `images` images each.

    The fixed cost of a step is paid once for each of the `stacks` stacks, groups of networks trained together.
    """
    steps = schedule.epochs * -(-images // schedule.batch_size)
    trained = passes(kind, run, shape, networks * schedule.epochs * images)
    return [trained, WorkPart("steps", run, stacks * steps * STEP_OVERHEAD)]


def validation(run: RunConfig, shape: DataShape) -> Work:
    """Work of one validation of a run's set: to train networks on the set and score them."""
    first, seeds = run.each_backbone()[0], run.distill.validation_seeds
    training = _training("training", first, shape, validation_schedule(run, 1.0), shape.synthetic(run), seeds, seeds)
    scored = seeds * shape.set_aside(run.dataset)
    return [*training, passes("scoring", first, shape, scored), *reading(first, shape, scored)]


def labels(run: RunConfig, shape: DataShape, epochs: int) -> Work:
    """Work of labelling a run's set by its teacher, with new labels for each of `epochs` epochs."""
    return [passes("scoring", teacher_of(run), shape, epochs * shape.synthetic(run))]


def divided_epochs(epochs: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Divide the epochs to label into 4 * `workers` nearly equal tasks, or one task per epoch if there are fewer."""
    parts = np.array_split(epochs, min(len(epochs), 4 * workers)) if epochs else []
    return [tuple(part.tolist()) for part in parts]


@dataclass(frozen=True)
class Row:
    """Row of a run's accuracy table: networks that are trained on one kind of set and scored, such as on random images.

    Rows of random images draw other images for every seed.
    """

    run: RunConfig
    name: str
    """Key of the row in `ALL_ROWS`, such as "distilled"."""
    network: NetworkConfig | None
    """Scored network; `None` for the backbone."""
    shape: DataShape
    """Shape of the run's data."""

    @property
    def scored(self) -> RunConfig:
        """The run's recipe with the scored network in place of the backbone."""
        return self.run.model_copy(update={"network": self.network or self.run.network})

    @property
    def images(self) -> int:
        """Number of images that each network is trained on."""
        return self.shape.trained(self.run.dataset) if self.name == "full" else self.shape.synthetic(self.run)

    def training(self, seeds: int) -> tuple[int, Schedule]:
        """Number of networks that `seeds` seeds of the row train, and the schedule of their training.

        The schedule's step size is a placeholder: each network is trained with a step size of its own.
        """
        each, schedule = training_of(self.run, self.name, self.network)
        return seeds * each, schedule

    def seeds_of_tasks(self, least: int) -> list[tuple[int, ...]]:
        """Divide the seeds of the row into tasks. Returns the numbers of each task's seeds.

        A task has one seed, or several if their networks can be trained together. The number of tasks is a multiple of
        `least` if there are enough seeds, so that as many workers get equal work.

        Args:
            least: fewest tasks to make, if there are as many seeds.
        """
        seeds = parts = self.run.evaluate.seeds
        if self.largest_stack(seeds) > 1:
            parts = min(seeds, least * -(-seeds // (least * LARGEST_STACK)))
        return [tuple(part.tolist()) for part in np.array_split(np.arange(seeds), parts)]

    def largest_stack(self, seeds: int) -> int:
        """Largest number of networks that a task with `seeds` seeds of the row trains at the same time.

        The number is 1 if training them one after another is faster, or the only possibility.
        """
        networks, gains, stacks = self._stacking(seeds)
        return stack_sizes(networks)[0] if gains and stacks else 1

    @property
    def is_unstackable(self) -> bool:
        """True if the row's networks are trained one by one only because their architecture cannot be stacked."""
        _, gains, stacks = self._stacking(self.run.evaluate.seeds)
        return gains and not stacks

    def _stacking(self, seeds: int) -> tuple[int, bool, bool]:
        """How a task with `seeds` seeds of the row trains its networks.

        Returns:
            The number of networks for `seeds` seeds; True if training them together is faster; and True if it is
            possible. The last two are False without compilation, or if a teacher labels the row's images.
        """
        networks, schedule = self.training(seeds)
        if not self.run.cluster.compile or is_taught(self.run, self.name):
            return networks, False, False
        on_gpu = uses_gpu(self.run.cluster.shaped(light=True))
        alike, image = networks_alike(self.run, self.name, self.network), self.shape.image
        spec = self.scored.network.for_images(image[0], image[1:], self.shape.classes)
        cost, is_stackable = cost_and_stacking(spec)
        gains = would_gain_together(lambda: cost, networks, self.images, schedule, on_gpu=on_gpu, alike=alike)
        return networks, gains, is_stackable


def evaluation(row: Row, seeds: int) -> Work:
    """Work of a task that trains and scores the networks of `seeds` seeds of a row of the accuracy table."""
    (networks, schedule), run, shape = row.training(seeds), row.scored, row.shape
    is_stacked = row.largest_stack(seeds) > 1
    kind = "experts" if is_stacked else "real" if row.name == "full" else "training"
    stacks = len(stack_sizes(networks)) if is_stacked else networks
    tested = networks * shape.set_aside(run.dataset) + seeds * shape.test_images
    work = _training(kind, run, shape, schedule, row.images, networks, stacks)
    work.append(passes("scoring", run, shape, tested))
    work += reading(run, shape, tested + (row.name == "full") * networks * schedule.epochs * row.images)
    if asks_teacher(row.run, row.name):
        work.append(passes("scoring", teacher_of(row.run), shape, networks * schedule.epochs * row.images))
    return work


def fewest_tasks(works: Sequence[float], workers: int) -> list[int]:
    """Fewest tasks into which to divide each row of the accuracy table, so that all workers get equal work.

    Returns a number of tasks for each of `works`. With these numbers no worker is idle, and no task has more than the
    total work divided by `workers`.

    Args:
        works: expected work of each row, in any unit.
        workers: number of workers that score at the same time.
    """
    share, each = sum(works) / workers, -(-workers // len(works))
    return [max(each, math.ceil(work / share - 1e-6)) for work in works]


def divided_rows(rows: Sequence[Row], workers: int) -> list[list[tuple[int, ...]]]:
    """Divide the seeds of each row of the accuracy table into tasks, so that all workers get about equal work.

    Returns one list for each row. Each tuple in the list has the numbers of the seeds of one task.
    """

    def training(row: Row) -> float:
        (networks, schedule), flop = row.training(row.run.evaluate.seeds), network_cost(row.scored, row.shape).flop
        return networks * work_of_training(schedule, row.images, flop)

    # The division decides which networks share a stack, and so the last bits of accuracies. It counts training alone.
    fewest = fewest_tasks([training(row) for row in rows], workers)
    return [row.seeds_of_tasks(least) for row, least in zip(rows, fewest, strict=True)]
