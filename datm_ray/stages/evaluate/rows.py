"""Evaluation: each task trains fresh networks on a set, one for every seed, and scores them on the test set.

Rows of the accuracy table are the distilled set and three controls. Random real images with hard labels, and with soft
labels, show what the distilled pixels are worth. All real data is the ceiling. A control's learning rate is chosen on
validation data for each seed. The distilled set uses its own step size if its method gives one
(`Method.gives_step_size`); otherwise the step size is chosen on validation data too. Nothing is chosen on the test set.

A set is also scored on other architectures (`ON_OTHERS`). A learned step size belongs to the backbone, so two
accuracies are reported: with the learned step size, and with the candidate that is best on validation data. Every
matched network has its own learned step size. With another optimiser than SGD no step size was learned, so all step
sizes are chosen on validation data. `evaluate.learning_rate` is the backbone's too: on other architectures it is one of
the candidates.

With `evaluate.labels: teacher`, networks of the rows with soft labels (`SOFT`) learn from a teacher: expert 0 of the
first trained network, or of `evaluate.teacher`. The teacher's logits of every augmented batch replace the labels, see
`core.training.teacher`. With `stored`, the labels of the distilled set are made beforehand, see `stages.labels`. Random
images are labelled by the same rule: as many epochs, the same views and as many logits. No step size was learned for a
teacher's labels.

The networks of a task, a network for each seed and candidate step size, are trained in stacks where this is faster
(`core.training.loop.Trainer`). A task that is stopped or killed resumes with the same bits (see `progress`).

Training settings may change in a finished run, so every choice of settings has its own result files. The row on all
real data always uses the training of `evaluate.protocol`. Rows with hard labels keep their labels, and choose their
step size on validation data.

`evaluate.fixed_labels` adds rows of the same set, and of random images, with labels that stay the same (`FIXED_ROWS`).
Under a teacher, one table then shows what labels for every epoch add. Step sizes of these rows are chosen on validation
data, among them the learned one.

`evaluate.fair` adds three rows (`FAIR_ROWS`). DD-Ranking's scores (see `core.scores`) are computed seed by seed from
these rows and the rows of the table. All networks of a seed have the same initial parameters. For distilled images with
hard labels, the step size is chosen on validation data; the learned step size is among the candidates. Without
augmentation, the distilled set keeps the learned step size. For random images the step size is chosen on validation
data. Soft labels of a random image are the mean logits of the experts that classify it correctly. The distilled set's
labels start from the same kind of logits.

DD-Ranking's program (0.2.0) differs in four points. It chooses step sizes on the test set. It keeps the best of every
20 epochs by test accuracy (here: the last epoch). It labels random images by one teacher. By default it does not
augment with hard labels (here only `PLAIN` rows are not augmented).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import (
    ClusterConfig,
    EvaluateConfig,
    NetworkConfig,
    RunConfig,
    expert_fingerprint,
    run_identity,
    scoring_identity,
    stable_hash,
)
from datm_ray.config.identity import SCORING_KEYS
from datm_ray.config.sections import SECTIONS_OF_METHODS
from datm_ray.core.images.batches import ImageReader, Images
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.steps import Steps, all_of
from datm_ray.core.synthetic import random_rows
from datm_ray.core.training.loop import (
    OPTIMISERS,
    Schedule,
    Training,
    accuracy_in_steps,
    scoring_schedule,
)
from datm_ray.core.training.teacher import Lessons, StoredLessons, Teacher
from datm_ray.data.dataset import Dataset
from datm_ray.monitor.logs import fields
from datm_ray.monitor.provenance import provenance
from datm_ray.monitor.spent import Account, Spent
from datm_ray.replay import ReplayedLabels
from datm_ray.runtime.executor import Finished, Note, Phase, Progress, explaining_memory
from datm_ray.runtime.heartbeats import interval_between_epochs, reporting
from datm_ray.runtime.machine.devices import images_on, network_on, prepare_device, set_on, to_device
from datm_ray.shape import DataShape
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.distill.validation import trainer_of
from datm_ray.stages.evaluate.memory import memory_remedy, scoring_step_bytes
from datm_ray.stages.evaluate.progress import SCORING, SavedTraining
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.labels import drawn_labels, kept_labels, labels_location
from datm_ray.stages.methods.registry import method_of, networks_before_scoring, teacher_of, trained_backbones
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.labels import LabelStore

TABLE_ROWS = {
    "random-hard": "random real images, hard labels",
    "random-fixed": "random real images, one soft label each",
    "random-soft": "random real images, soft labels",
    "distilled-hard": "distilled, hard labels",
    "distilled-fixed": "distilled, one soft label each",
    "distilled": "distilled",
    "full": "all real data",
}
"""Key of each row (a training set) that the accuracy table may have -> its title, in the order shown."""

ROWS = {row: TABLE_ROWS[row] for row in ("random-hard", "random-soft", "distilled", "full")}
"""Keys of the usual rows of the accuracy table -> titles. A run may leave out some of them, see `scored_rows`."""

FIXED_ROWS = {row: TABLE_ROWS[row] for row in ("distilled-hard", "random-fixed", "distilled-fixed")}
"""Keys of the rows that `evaluate.fixed_labels` adds, with labels that are the same in all epochs -> titles. The first
one is also a row of `FAIR_ROWS`."""

FAIR_ROWS = {
    "distilled-hard": TABLE_ROWS["distilled-hard"],
    "distilled-plain": "distilled, not augmented",
    "random-plain": "random real images, soft labels, not augmented",
}
"""Keys of the rows that `evaluate.fair` adds, to compute DD-Ranking's scores -> titles."""

ALL_ROWS = TABLE_ROWS | FAIR_ROWS
"""Keys of all rows, of the accuracy table and of DD-Ranking's scores -> titles."""

DISTILLED = ("distilled", "distilled-hard", "distilled-fixed", "distilled-plain")
"""Keys of the rows of `ALL_ROWS` whose networks are trained on distilled images."""

PLAIN = ("distilled-plain", "random-plain")
"""Keys of the rows of `FAIR_ROWS` whose networks are trained without augmentation."""

SOFT = ("random-soft", "distilled", "distilled-plain", "random-plain")
"""Keys of the rows of `ALL_ROWS` whose soft labels are replaced by a teacher's if the recipe asks for a teacher."""

ON_OTHERS = ("random-soft", "distilled")
"""Keys of the rows of the accuracy table that are scored on every network of `evaluate.networks`."""

UNLABELLED_ON_OTHERS = ("random-hard", "distilled")
"""Keys of the rows of the accuracy table that are scored on every network of `evaluate.networks` if no experts exist
to label random images."""

CONTROLS = "controls"
"""Name of the folder, in an output folder, with results that do not depend on a distilled set. Runs share them."""

_log = logging.getLogger(__name__)


TrainingSet = tuple[Images, Tensor, float | None]
"""Training set of a row: images, labels, and the step size learned with them. The step size is `None` if none was
learned, so that it must be chosen on validation data."""


class EvaluateWorker:
    """Worker that trains and scores fresh networks on one data set."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster = cluster
        self._dataset = dataset
        self._experts: dict[str, ExpertNetworks] = {}
        self._teachers: dict[str, nn.Module] = {}
        self._beside = 0
        """Bytes of GPU memory that images leave free: the most that a training step here has needed so far."""
        self._has_noted = False
        """True once the worker has yielded its note on compilation, which it yields only once."""

    def evaluate(
        self,
        config: RunConfig,
        store_uri: str,
        folder_uri: str,
        result_uris: Sequence[str],
        row: str,
        numbers: Sequence[int],
        network: NetworkConfig | None = None,
    ) -> Iterator[Progress | Phase | Note | Finished]:
        """Train and test the networks of one row of the accuracy table, for some seeds.

        The file of a result is written after all else, so an existing file is complete.

        Args:
            config: recipe of the run.
            store_uri: store of the experts, for soft labels of random images.
            folder_uri: folder with the distilled set.
            result_uris: file to write for each seed; an existing file stays unchanged.
            row: key of `ALL_ROWS`.
            numbers: numbers of the seeds, from 0.
            network: network of `evaluate.networks` to score, with the learned and with a tuned step size; `None` for
                the backbone. With another optimiser than SGD there is no learned step size.

        Raises:
            MissingExpertsError: the store lacks the experts that label random images, or the teacher.
            WorkerLostError: the GPU has too little free memory.
            Interrupted: the work was asked to stop, and is saved.
        """
        account = Account(self._device, self._cluster)
        seeds = [derive_seed(config.seed, Purpose.EVALUATION, number) for number in numbers]
        folder, places = open_location(folder_uri), [open_location(uri) for uri in result_uris]
        interval, dataset, place = interval_between_epochs(self._cluster), self._dataset, (self._device, self._cluster)
        with explaining_memory(memory_remedy(config, self._shape, row, network)):
            self._keep_free(config, row, network)
            works = self._training_sets(config, store_uri, folder, row, seeds, network)
            sets = yield from reporting(works, "preparing the images", interval, at_once=False)
            step_size = sets[0][2] if has_learned_step_size(config, row) else None
            schedules = _schedules(config, row, step_size, network)
            lessons = self._lessons(config, store_uri, row, folder, sets[0][0])
            spec = (network or config.network).for_images(dataset.channels, dataset.size, dataset.classes)
            trainings = [
                Training(network_on(build_network(spec, seed), *place), images, targets, schedule, seed)
                for schedule in schedules
                for seed, (images, targets, _) in zip(seeds, sets, strict=True)
            ]
            trainer, alike = trainer_of(self._cluster, self._device), networks_alike(config, row, network)
            training = SavedTraining(trainer, trainings, lessons, places[0], account, alike)
            if trainer.note and not self._has_noted:
                self._has_noted = True
                yield Note(trainer.note)
            measured = yield from training.run(*place, self._validation_accuracy)
            every = [*map(_Trial, trainings, measured)]
            tests = (self._tested(every[first :: len(seeds)], learns=bool(step_size)) for first in range(len(seeds)))
            tested = yield from reporting(all_of(tests), SCORING, interval, at_once=False)
        spent = (account.spent() + training.spent).share(1 / len(seeds))
        shared = {"row": row, "learned_step_size": step_size, "images": len(sets[0][0])}
        results = [
            shared | {"number": number, "seed": seed} | self._result(*trials, spent)
            for number, seed, trials in zip(numbers, seeds, tested, strict=True)
        ]
        for file, result in zip(places, results, strict=True):
            self._write(file, result, config.name, len(schedules))
        training.remove()
        yield Finished(results, account.metrics())

    @property
    def _shape(self) -> DataShape:
        return DataShape(self._dataset.image_shape, self._dataset.classes, 0)

    def _keep_free(self, config: RunConfig, row: str, network: NetworkConfig | None) -> None:
        """Keep as much memory of a GPU free of images as a training step of a row's networks takes.

        If earlier rows needed less, validation and test images are dropped, and placed again when they are needed.
        """
        if self._device.type == "cpu":
            return
        is_full = row == "full"
        images = len(self._dataset.train_labels) if is_full else self._shape.synthetic(config)
        trained = _of_all_images(config) if is_full else config
        needed = scoring_step_bytes(trained, self._shape, images, network)
        if needed > self._beside:
            self._beside = needed
            for name in ("_test_set", "_validation_set"):
                self.__dict__.pop(name, None)

    def _result(self, chosen: _Trial, of_test: float, with_learned: float | None, spent: Spent) -> dict[str, Any]:
        """Part of a result file that describes one network: accuracies, step size, cost and provenance.

        Args:
            chosen: trial with the best validation accuracy.
            of_test: test accuracy of this trial, in [0, 1].
            with_learned: test accuracy with the learned step size, in [0, 1]; `None` if no step size was learned.
            spent: cost of training and testing the networks of this seed.
        """
        return {
            "test_accuracy": of_test,
            "test_accuracy_with_learned_step_size": with_learned,
            "validation_accuracy": chosen.validation_accuracy,
            "step_size": chosen.training.schedule.learning_rate,
            "seconds": spent.seconds,
            "cost": spent.to_json(),
            "provenance": provenance(self._device),
        }

    def _write(self, place: Location, result: dict[str, Any], run: str, candidates: int) -> None:
        if not place.exists():
            place.write_json(result)
            values = {key: result[key] for key in ("row", "number", "step_size", "seconds")}
            scored = fields(run=run, accuracy=result["test_accuracy"], candidates=candidates)
            _log.info("network scored %s %s", scored, fields(**values))

    def _tested(self, trials: Sequence[_Trial], *, learns: bool) -> Steps[tuple[_Trial, float, float | None]]:
        """Choose the trial with the best validation accuracy, and test it on the test images.

        Returns the trial, its test accuracy, and the test accuracy of the first trial. Accuracies are in [0, 1]. Yields
        between steps.

        Args:
            trials: networks trained with one candidate step size each.
            learns: True if the first trial has the learned step size; False makes the last result `None`.
        """
        chosen = max(trials, key=lambda trial: trial.validation_accuracy)
        tested = yield from self._test_accuracy(chosen)
        if not learns:
            return chosen, tested, None
        return chosen, tested, tested if chosen is trials[0] else (yield from self._test_accuracy(trials[0]))

    def _test_accuracy(self, trial: _Trial) -> Steps[float]:
        return accuracy_in_steps(trial.training.network, *self._test_set)

    def _placed(self, images: NDArray[np.float32] | ImageReader, labels: NDArray[np.int64]) -> tuple[Images, Tensor]:
        """Images, on the device if they fit beside a training step, else in main memory; and labels on the device."""
        return images_on(images, self._device, self._beside), to_device(labels, self._device)

    @functools.cached_property
    def _test_set(self) -> tuple[Images, Tensor]:
        """Test images and labels, placed once for all networks, see `_placed`."""
        return self._placed(self._dataset.test_images, self._dataset.test_labels)

    def _training_sets(
        self,
        config: RunConfig,
        store_uri: str,
        folder: Location,
        row: str,
        seeds: Sequence[int],
        network: NetworkConfig | None,
    ) -> Steps[list[TrainingSet]]:
        """Make the training set of a row of the accuracy table for each of `seeds`, in order. Yields between steps.

        A set that all seeds share is read and copied only once.

        Args:
            store_uri: store of the experts that label random images.
            folder: folder of the run, with the distilled set.
            network: scored network, which decides the learned step size; `None` for the backbone.
        """
        if row in DISTILLED:
            artifact = read_artifact(folder / SYNTHETIC)
            learned = _learned_step_size(artifact, config, network)
            targets = artifact.labels if row == "distilled-hard" else artifact.soft_labels
            images = set_on(artifact.images, self._device, self._beside)
            return [(images, targets.to(self._device), learned)] * len(seeds)
        if row == "full":
            return [(*self._placed(self._dataset.train_images, self._dataset.train_labels), None)] * len(seeds)
        return (yield from all_of(self._random_set(config, store_uri, row, seed) for seed in seeds))

    def _random_set(self, config: RunConfig, store_uri: str, row: str, seed: int) -> Steps[TrainingSet]:
        """Draw real images by `seed`, and label them as the row of the accuracy table asks. Yields between steps."""
        all_images, all_labels = self._dataset.train_images, self._dataset.train_labels
        rows = random_rows(all_labels, config.distill.ipc, seed)
        drawn = to_device(all_images[rows], torch.device("cpu"))
        images, labels = set_on(drawn, self._device, self._beside), to_device(all_labels[rows], self._device)
        if row == "random-hard" or is_taught(config, row):
            return images, labels, None
        return images, (yield from self._expert_networks(config, store_uri).soft_labels(images, labels)), None

    def _expert_networks(self, config: RunConfig, store_uri: str) -> ExpertNetworks:
        if config.name not in self._experts:
            self._experts[config.name] = ExpertNetworks(config, self._dataset, store_uri, self._device)
        return self._experts[config.name]

    def _lessons(self, config: RunConfig, store_uri: str, row: str, folder: Location, images: Images) -> Lessons | None:
        """Labels of a teacher for networks of a row of the accuracy table; `None` if they learn from the set's labels.

        Rows in `PLAIN` have no CutMix.

        Args:
            folder: folder of the run.
            images: the images on which the networks are trained.
        """
        if not is_taught(config, row):
            return None
        assert isinstance(images, Tensor)  # sets as small as a synthetic one are never streamed
        if is_stored(config, row):
            place = labels_location(folder, config, self._dataset.fingerprint)
            store = LabelStore(place, keep=kept_labels(config))
            labels = ReplayedLabels(images, store, device=self._device)
            return StoredLessons(labels, config.evaluate.temperature)
        settings, teacher, at_once = config.evaluate, self._teacher(config, store_uri), config.evaluate.micro_batch
        if has_stored_views(config, row):
            return StoredLessons(drawn_labels(config, teacher, images), settings.temperature)
        return Teacher(teacher, settings.temperature, 0.0 if row in PLAIN else settings.cutmix, at_once)

    def _teacher(self, config: RunConfig, store_uri: str) -> nn.Module:
        if config.name not in self._teachers:
            experts = ExpertNetworks(teacher_of(config), self._dataset, store_uri, self._device)
            self._teachers[config.name] = network_on(experts.restored(0), self._device, self._cluster)
        return self._teachers[config.name]

    def _validation_accuracy(self, network: nn.Module) -> Steps[float]:
        return accuracy_in_steps(network, *self._validation_set)

    @functools.cached_property
    def _validation_set(self) -> tuple[Images, Tensor]:
        """Validation images and labels, placed once for all networks, see `_placed`."""
        return self._placed(self._dataset.validation_images, self._dataset.validation_labels)


def is_taught(config: RunConfig, row: str) -> bool:
    """True if networks of this row of the accuracy table learn a teacher's labels, not the labels of its set."""
    return config.evaluate.has_teacher and row in SOFT


def is_stored(config: RunConfig, row: str) -> bool:
    """True if a teacher's labels for this row of the accuracy table are computed before training, and stored.

    False if the teacher is asked during training, or does not label the row.
    """
    return config.evaluate.stores_labels and row == "distilled"


def asks_teacher(config: RunConfig, row: str) -> bool:
    """True if networks of this row of the accuracy table have a teacher's labels that are computed during training."""
    return is_taught(config, row) and not is_stored(config, row)


def has_stored_views(config: RunConfig, row: str) -> bool:
    """True if networks of this row train on views (augmented images) and logits as a label store holds them.

    The views and logits of the row "distilled" are stored. Views and logits of the row "random-soft" are made by the
    same rule when they are needed. So the two rows differ in their images alone.
    """
    return config.evaluate.stores_labels and row in ("distilled", "random-soft")


def has_learned_step_size(config: RunConfig, row: str) -> bool:
    """True if networks of this row of the accuracy table are trained with the step size learned with the set.

    The learned step size may be one of several candidates; validation chooses one.
    """
    is_replaced = given_rate(config, row) is not None or is_taught(config, row)
    is_there = method_of(config).has_step_size(config) and config.evaluate.optimiser == "sgd"
    return row in DISTILLED and is_there and not is_replaced


def given_rate(config: RunConfig, row: str) -> float | None:
    """Value of `evaluate.learning_rate` for rows of the accuracy table that read it; `None` for others, or if null."""
    return config.evaluate.learning_rate if row in SOFT else None


def _schedules(config: RunConfig, row: str, learned: float | None, network: NetworkConfig | None) -> list[Schedule]:
    """Candidate schedules for networks of a row of the accuracy table, with different step sizes.

    Validation chooses among the candidates. A learned step size is the only candidate if `network` is `None`, except in
    `FIXED_ROWS`; else it is the first of several. For rows with soft labels, `evaluate.learning_rate` takes its place,
    and is also the only candidate if `network` equals the backbone. Without both, the optimiser's step sizes are tried.

    Args:
        learned: step size that was learned with the set; `None` if none was learned.
        network: scored network of `evaluate.networks`; `None` for the backbone.
    """
    others: tuple[float, ...] = OPTIMISERS[config.evaluate.optimiser].step_sizes
    if (given := given_rate(config, row)) is not None:
        learned, others = given, tuple(rate for rate in others if rate != given)
    is_backbone = network is None or (given is not None and network == config.network)
    is_its_own = is_backbone and row not in FIXED_ROWS
    rates = others if not learned else (learned,) if is_its_own else (learned, *others)
    schedule = row_schedule(config, row)
    return [dataclasses.replace(schedule, learning_rate=rate) for rate in rates]


def row_schedule(config: RunConfig, row: str) -> Schedule:
    """Training schedule for networks of a row of the accuracy table; its learning rate is a placeholder."""
    if row == "full":
        config = _of_all_images(config)
    settings = config.evaluate
    schedule = scoring_schedule(settings, 0.0).with_optimiser(settings.optimiser, settings.weight_decay)
    if row == "full":
        epochs = config.evaluate.real_epochs
        schedule = dataclasses.replace(schedule, epochs=epochs, decay_epoch=(epochs + 1) // 2)
    if config.evaluate.stores_labels and row in SOFT:  # as the stored views are augmented
        schedule = dataclasses.replace(schedule, augmentation="resized+flip")
    return dataclasses.replace(schedule, augmentation="") if row in PLAIN else schedule


def _of_all_images(config: RunConfig) -> RunConfig:
    """Copy of a run's configuration for the row on all real data: the keys in `SCORING_KEYS` have their defaults.

    With these defaults, networks are trained as `evaluate.protocol` says.
    """
    fields = EvaluateConfig.model_fields
    settings = config.evaluate.model_copy(update={key: fields[key].default for key in SCORING_KEYS})
    return config.model_copy(update={"evaluate": settings})


def scored_rows(config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
    """Rows (keys of `ALL_ROWS`) that a run computes, each with the network that it scores; `None` for the backbone."""
    is_labelled, is_full = bool(networks_before_scoring(config)), config.evaluate.full
    rows = [row for row in ROWS if (row != "full" or is_full) and (row != "random-soft" or is_labelled)]
    rows += fixed_rows(config)
    rows += [row for row in FAIR_ROWS if config.evaluate.fair and row not in rows]
    on_others = ON_OTHERS if is_labelled else UNLABELLED_ON_OTHERS
    others = ((row, network) for network in config.scored_networks for row in on_others)
    return [*((row, None) for row in rows), *others]


def fixed_rows(config: RunConfig) -> list[str]:
    """Rows of `FIXED_ROWS` that a run computes; empty without `evaluate.fixed_labels`.

    With this key, "distilled-hard" is computed. "distilled-fixed" and "random-fixed" need a teacher and a set with soft
    labels: without a teacher the labels of the rows "distilled" and "random-soft" are fixed already. "random-fixed"
    also needs a trained backbone, which labels the random images.
    """
    if not config.evaluate.fixed_labels:
        return []
    is_soft = config.evaluate.has_teacher and method_of(config).has_soft_labels(config)
    is_labelled = is_soft and bool(trained_backbones(config))
    made = {"distilled-hard": True, "random-fixed": is_labelled, "distilled-fixed": is_soft}
    return [row for row in FIXED_ROWS if made[row]]


def training_of(config: RunConfig, row: str, network: NetworkConfig | None) -> tuple[int, Schedule]:
    """Number of networks trained for one row of the accuracy table and one seed, and their schedule.

    The schedule's step size is a placeholder; each network is trained with a candidate of its own.

    Args:
        network: scored network; `None` for the backbone.
    """
    schedules = _schedules(config, row, 1.0 if has_learned_step_size(config, row) else None, network)
    return len(schedules), row_schedule(config, row)


def networks_alike(config: RunConfig, row: str, network: NetworkConfig | None) -> int:
    """Number of networks in a run that share the training step of this row of the accuracy table.

    Networks share the step if they have the same architecture and the same number of images. A process compiles the
    step once for all stacks (networks trained together) of one size. The networks of the row itself count too. Rows
    that a teacher labels do not count. The number does not depend on what is finished, so a resumed run trains the same
    stacks.

    Args:
        network: scored network; `None` for the backbone.
    """
    rows = [each for each in scored_rows(config) if each[1] == network and not is_taught(config, each[0])]
    same = [each for each in rows if (each[0] == "full") == (row == "full")]
    return config.evaluate.seeds * sum(training_of(config, *each)[0] for each in same)


class _Trial(NamedTuple):
    """Result of training one network with one of the candidate learning rates."""

    training: Training
    validation_accuracy: float


def _learned_step_size(artifact: Artifact, config: RunConfig, network: NetworkConfig | None) -> float:
    """Step size learned with `network`; that of the first backbone if `network` was not matched or is `None`."""
    matched = [each.network for each in config.each_backbone()]
    number = matched.index(network) if network in matched else 0
    return artifact.step_sizes[number] if number < len(artifact.step_sizes) else artifact.step_size


def result_location(
    out: Location,
    config: RunConfig,
    dataset_fingerprint: str,
    row: str,
    number: int,
    network: NetworkConfig | None = None,
) -> Location:
    """File of the result for one row of the accuracy table and one seed.

    Controls do not depend on the distillation, so runs share them. Runs with the same network share the row on all real
    data. Runs share rows on random images if they also have the same experts and number of images per class. Results of
    training with other settings than those of `evaluate.protocol` have folders of their own.

    Args:
        out: output folder of the run.
        config: recipe of the run.
        dataset_fingerprint: fingerprint of the data set.
        row: key of `ALL_ROWS`.
        number: number of the seed, from 0.
        network: scored network of `evaluate.networks`; `None` for the backbone.
    """
    if row in DISTILLED:
        folder = out / config.name / "evaluation"
    else:
        identity = run_identity(config)
        identity.pop("method", None)
        for section in ("name", "distill", *SECTIONS_OF_METHODS, "metadd", *(["experts"] if row == "full" else [])):
            identity.pop(section, None)
        ipc = {} if row == "full" else {"ipc": config.distill.ipc}
        folder = out / CONTROLS / stable_hash({"dataset": dataset_fingerprint, **identity, **ipc})
    if config.evaluate.optimiser != "sgd":
        folder = folder / config.evaluate.optimiser
    training = _training_identity(config, dataset_fingerprint, row)
    if network not in (None, config.network) and given_rate(config, row) is not None:
        training["step_sizes"] = "chosen"  # earlier versions tried the given one alone
    if training:
        folder = folder / f"trained-{stable_hash(training)}"
    if network is not None:
        folder = folder / f"{network.architecture.replace(':', '-')}-{stable_hash(network.model_dump())}"
    return folder / f"{row}-{number:02d}.json"


def _training_identity(config: RunConfig, dataset_fingerprint: str, row: str) -> dict[str, Any]:
    """Settings of `evaluate` that change how a row's networks are trained: key -> value.

    The result is empty if all these settings have their defaults, and for the row "full". If a teacher labels the row,
    the result also has the key "teacher", with the fingerprint of the teacher's experts. If the row's views
    are drawn as stored views are, but are not stored, the result has the key "views" too.

    Args:
        row: key of `ALL_ROWS`.
    """
    identity = scoring_identity(config)
    if row == "full":
        return {}
    left_out = {"temperature", "cutmix", "keep_labels", "top_logits"}
    if is_taught(config, row):
        left_out = set() if has_stored_views(config, row) else {"keep_labels", "top_logits"}
        if has_stored_views(config, row) and not is_stored(config, row):
            identity["views"] = "stored"  # earlier versions drew other views for this row
        identity["teacher"] = expert_fingerprint(teacher_of(config), dataset_fingerprint)
    elif row not in SOFT:
        left_out |= {"labels", "learning_rate"}
    return {key: value for key, value in identity.items() if key not in left_out}
