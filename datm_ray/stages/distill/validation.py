"""Validation of the sets of a distillation, by its own workers or as separate tasks for any worker.

Workers that distil wait while one of them validates. If other workers are free, the set is instead written to a file,
a candidate. Any worker validates the candidate while the distillation continues.

    candidates/<iteration>.arrow   the set after this number of iterations, in the format of the result
    candidates/<iteration>.json    the set's validation accuracy, its standard error, and the cost

A later checkpoint adds the results to the state, in the order of iterations and without gaps. So the chosen set is the
same as in a distillation that waits. A candidate is written before the checkpoint of its iteration, and validated after
this checkpoint. A candidate is deleted when a checkpoint holds its result. When all iterations are done, the worker
that writes the last missing result also writes the final set.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from datm_ray.artifact import read_artifact
from datm_ray.config import ClusterConfig, DistillConfig, RunConfig
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import Rows, SyntheticSet
from datm_ray.core.training.loop import (
    PROTOCOLS,
    Schedule,
    Trainer,
    Training,
    accuracy_in_steps,
    trainer,
    validation_protocol,
)
from datm_ray.data.dataset import Dataset
from datm_ray.errors import StoreError
from datm_ray.methods.state import State
from datm_ray.monitor.spent import Spent
from datm_ray.runtime.executor import Progress
from datm_ray.runtime.machine.devices import channels_last_on, images_on, network_on, to_device
from datm_ray.stages.distill.checkpoint import read_iteration
from datm_ray.stages.experts.progress import REPORT_INTERVAL, remove_folder
from datm_ray.store.files.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense

CANDIDATES = "candidates"


def is_due(settings: DistillConfig, iteration: int) -> bool:
    """True if the set is validated after `iteration` iterations."""
    every = settings.validate_every
    return every > 0 < iteration and (iteration % every == 0 or iteration == settings.iterations)


def validations(settings: DistillConfig) -> int:
    """Number of validations in one whole distillation."""
    return -(-settings.iterations // settings.validate_every) if settings.validate_every else 0


def unvalidated(settings: DistillConfig, state: State[Any]) -> list[int]:
    """Numbers of iterations after which a validation was due and whose result the state lacks.

    The last one is at most the state's own iteration, inclusive.
    """
    last = state.validations[-1][0] if state.validations else 0
    return [iteration for iteration in range(last + 1, state.iteration + 1) if is_due(settings, iteration)]


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Accuracy and cost of the validation of one candidate, the set after some iterations."""

    accuracy: float
    """Mean accuracy of fresh networks on the validation images, in [0, 1]."""
    cost: Spent


def _stem(iteration: int) -> str:
    """Name, without the ending, of the files of the set after `iteration` iterations. Names sort as iterations do."""
    return f"{iteration:08d}"


class Candidates:
    """Files of one distillation's candidates, and of their validation results.

    A candidate is the set after some number of iterations, written so that any worker can validate it.
    """

    def __init__(self, folder: Location) -> None:
        """Open the candidates in `folder`, the folder of a run."""
        self._run, self._folder = folder, folder / CANDIDATES

    @staticmethod
    def name(iteration: int) -> str:
        """Path of the file of the set after `iteration` iterations, relative to the run's folder."""
        return f"{CANDIDATES}/{_stem(iteration)}.arrow"

    def file(self, iteration: int) -> Location:
        """File of the set after `iteration` iterations."""
        return self._run / self.name(iteration)

    def open(self) -> list[int]:
        """Numbers of iterations, sorted, after which a set was written that has no validation result yet."""
        names = set(self._folder.list())
        stems = sorted(name.removesuffix(".arrow") for name in names if name.endswith(".arrow"))
        return [int(stem) for stem in stems if f"{stem}.json" not in names]

    def results(self, iterations: Sequence[int]) -> list[ValidationResult]:
        """Validation results of these iterations, in order, up to the first iteration without a result.

        Raises:
            CorruptFileError: the file of a result is damaged.
        """
        found, names = [], self._folder.list()
        for iteration in iterations:
            if (name := f"{_stem(iteration)}.json") not in names:
                break
            content = (self._folder / name).read_json()
            with rejecting_nonsense(self._folder / name):
                found.append(ValidationResult(float(content["accuracy"]), Spent.from_json(content["cost"])))
        return found

    def write_result(self, iteration: int, accuracy: float, error: float, cost: Spent) -> None:
        """Write the validation result of the set after `iteration` iterations.

        Args:
            accuracy: mean accuracy on the validation images, in [0, 1].
            error: standard error of the accuracy, in the same unit.
            cost: cost of the validation.
        """
        content = {"iteration": iteration, "accuracy": accuracy, "standard_error": error, "cost": cost.to_json()}
        (self._folder / f"{_stem(iteration)}.json").write_json(content)

    def read(self, iteration: int, rows: Rows, device: torch.device) -> SyntheticSet:
        """Read a range of images, with labels, of the set after `iteration` iterations onto `device`.

        Raises:
            MissingFileError: the set's file is gone.
        """
        whole, cut = read_artifact(self.file(iteration)), slice(rows.first, rows.last)
        images, soft_labels, labels = (
            part[cut].clone().to(device) for part in (whole.images, whole.soft_labels, whole.labels)
        )
        return SyntheticSet(images, soft_labels, torch.tensor(whole.step_sizes, device=device), labels)

    def forget(self, first: int = 0, last: float = math.inf) -> None:
        """Remove the sets written after `first` to `last` iterations, inclusive, and their validation results."""
        for name in self._folder.list():
            stem = name.partition(".")[0]
            if stem.isdecimal() and first <= int(stem) <= last:
                with suppress(StoreError):  # another process has removed it
                    (self._folder / name).remove()

    def remove(self) -> None:
        """Remove the folder with all candidates and validation results."""
        remove_folder(self._folder)


def is_apart(workers_per_set: int, wanted: int, workers: int) -> bool:
    """True if validations are tasks of their own; False if a worker that distils also validates.

    Separate tasks save time if several workers of a set would otherwise wait for each validation, or if some workers
    have nothing else to do.

    Args:
        workers_per_set: number of workers that distil a set together.
        wanted: number of workers that all sets of the command use.
        workers: number of workers that the executor has.
    """
    return workers > 1 and (workers_per_set > 1 or workers > wanted)


def only_validations_are_left(folder: Location, settings: DistillConfig) -> bool:
    """True if the checkpoint has all iterations and the last set's candidate exists: only validations are left."""
    last = settings.iterations
    return Candidates(folder).file(last).exists() and read_iteration(folder) == last


def standard_error(mean: float, dataset: Dataset) -> float:
    """Standard error of a validation accuracy, in the unit of the accuracy, not percent.

    The standard error follows from the mean accuracy and the number of validation images. More networks do not reduce
    it, because scores on the same images are not independent draws.

    Args:
        mean: mean accuracy of the networks on the validation images, in [0, 1].
        dataset: data set with the validation images.
    """
    return math.sqrt(mean * (1 - mean) / len(dataset.validation_labels))


def validating(config: RunConfig, dataset: Dataset, whole: SyntheticSet, device: torch.device) -> Iterator[Progress]:
    """Train fresh networks on the whole set, and score them on validation images.

    Yields progress, also within epochs and while networks are scored. The last progress has the mean validation
    accuracy of the networks, in [0, 1], as its value "validation".
    """
    seeds = config.distill.validation_seeds
    spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
    schedule = validation_schedule(config, float(whole.step_size))
    images, labels = images_on(dataset.validation_images, device), to_device(dataset.validation_labels, device)
    epochs = seeds * schedule.epochs
    numbers = [derive_seed(config.seed, Purpose.VALIDATION, number) for number in range(seeds)]
    networks = [network_on(build_network(spec, seed), device, config.cluster) for seed in numbers]
    trainings = [
        Training(network, whole.images, whole.soft_labels, schedule, seed)
        for network, seed in zip(networks, numbers, strict=True)
    ]
    yield Progress(0, epochs)
    last, done, shares = time.monotonic(), 0, list[float]()

    def work() -> Steps[None]:
        nonlocal done
        for epoch in trainer_of(config.cluster, device).train_all(trainings, seeds * validations(config.distill)):
            done = epoch
            yield
        for each in trainings:
            shares.append((yield from accuracy_in_steps(each.network, images, labels)))

    for _ in work():
        if time.monotonic() - last > REPORT_INTERVAL:
            yield Progress(done, epochs)
            last = time.monotonic()
    yield Progress(epochs, epochs, {"validation": sum(shares) / seeds})


def trainer_of(cluster: ClusterConfig, device: torch.device) -> Trainer:
    """Trainer, shared by this whole process, of networks on `device`, with compilation as section `cluster` says."""
    return trainer(compile_=cluster.compile, channels_last=channels_last_on(cluster, device))


def validation_schedule(config: RunConfig, step_size: float) -> Schedule:
    """Training schedule of fresh networks for validation, with the set's own labels and learning rate `step_size`.

    The schedule ignores keys of `evaluate` that may change in a finished run.
    """
    protocol = PROTOCOLS[validation_protocol(config.evaluate.protocol)]
    return dataclasses.replace(protocol, learning_rate=step_size, augmentation=config.evaluate.augmentation)
