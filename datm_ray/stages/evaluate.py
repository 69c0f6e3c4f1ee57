"""Evaluation: each task trains fresh networks on a set, one for every seed, and scores them on the test set.

The table has the distilled set and three controls. Random real images with hard labels, and with soft labels, show what
the distilled pixels are worth. All real data is the ceiling. A control's learning rate is chosen on validation data for
each seed; the distilled set uses its learned step size. Each row uses the test set once per seed, and never to choose
anything.

A set is also scored on other architectures (`ON_OTHERS`). Its learned step size belongs to its backbone, so two
accuracies are reported: with the learned step size, and with the candidate that is best on validation data. Every
matched network has its own learned step size. With AdamW no step size was learned, and all are chosen on validation
data.

With `evaluate.labels: teacher`, networks of the rows with soft labels (`SOFT`) learn from expert 0 of the first trained
network: its logits of every augmented batch replace the labels, see `core.teacher`. With `stored`, the labels of the
distilled set are made beforehand, see `stages.labels`. No step size was learned for such labels.

Training settings may change in a finished run, so each setting has its own result files. The row on all real data
always uses the protocol's training. Rows with hard labels keep their labels, and choose their step size on validation
data.

`evaluate.fair` adds three rows (`FAIR_ROWS`). DD-Ranking's scores are computed from them and the rows of the table (see
`core.scores`), seed by seed. All networks of a seed have the same initial parameters. For distilled images with hard
labels, the step size is chosen on validation data; the learned step size is among the candidates. Without augmentation,
the distilled set keeps the learned step size. For random images it is chosen on validation data. Soft labels of
random images are the experts' mean correct logits. The distilled set's labels started from such logits as well.

DD-Ranking's program (0.2.0) differs in four points. It chooses step sizes on the test set. It keeps the best of every
20 epochs by test accuracy (here: the last epoch). It labels random images by one teacher. By default it does not
augment with hard labels (here only `PLAIN` rows are not augmented).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import (
    ClusterConfig,
    EvaluateConfig,
    NetworkConfig,
    NetworkSpec,
    RunConfig,
    expert_fingerprint,
    run_identity,
    scoring_identity,
    stable_hash,
)
from datm_ray.config.identity import SCORING_KEYS
from datm_ray.core.batches import Images
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import LARGEST_STACK
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.scores import AugmentationRobust, LabelRobust, augmentation_robust, label_robust
from datm_ray.core.synthetic import random_rows
from datm_ray.core.teacher import Lessons, StoredLessons, Teacher
from datm_ray.core.training import Schedule, accuracy, are_trained_together, work_of_training
from datm_ray.data.dataset import Dataset
from datm_ray.monitor.logs import fields
from datm_ray.monitor.provenance import provenance
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.replay import ReplayedLabels
from datm_ray.runtime.devices import Meter, images_on, prepare_device, to_device
from datm_ray.runtime.executor import Finished, Note, Progress
from datm_ray.stages.distill import SYNTHETIC
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.labels import labels_location
from datm_ray.stages.registry import method_of, teacher_of, trained_backbones
from datm_ray.stages.validation import evaluation_schedule, reported, trainer_of
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.labels import LabelStore
from datm_ray.store.sealed import rejecting_nonsense

ROWS = {
    "random-hard": "random real images, hard labels",
    "random-soft": "random real images, soft labels",
    "distilled": "distilled",
    "full": "all real data",
}
"""Rows of the table -> titles, in the order shown."""

FAIR_ROWS = {
    "distilled-hard": "distilled, hard labels",
    "distilled-plain": "distilled, not augmented",
    "random-plain": "random real images, soft labels, not augmented",
}
"""Further rows for DD-Ranking's scores -> titles."""

DISTILLED = ("distilled", "distilled-hard", "distilled-plain")
"""Keys of the table's rows whose networks are trained on distilled images."""

PLAIN = ("distilled-plain", "random-plain")
"""Keys of the table's rows whose networks are trained without augmentation."""

SOFT = ("random-soft", "distilled", "distilled-plain", "random-plain")
"""Keys of the rows with soft labels. A teacher may give these labels."""

ON_OTHERS = ("random-soft", "distilled")
"""Keys of the rows scored on every network of `evaluate.networks`."""

UNLABELLED_ON_OTHERS = ("random-hard", "distilled")
"""Keys of the rows scored on every network of `evaluate.networks` if no experts can label random images."""

CONTROL_STEP_SIZES = (0.01, 0.03, 0.1)
"""Candidate learning rates of SGD with momentum 0.9, for controls and for other architectures."""

ADAMW_STEP_SIZES = (3e-4, 1e-3, 3e-3)
"""Candidate learning rates of AdamW, for every row."""


@dataclass(frozen=True)
class Score:
    """Test accuracy of one row over several seeds."""

    row: str
    """Key of `ROWS` or `FAIR_ROWS`."""
    accuracies: tuple[float, ...]
    """Test accuracies in [0, 1], one per seed."""
    seconds: float
    """Wall-clock seconds of workers, summed over seeds."""
    cost: Spent | None = None
    """Cost, summed over seeds; `None` if an earlier version of this package wrote one of the results."""

    @property
    def spent(self) -> Spent:
        """Cost of the row. If it is unknown, a cost that holds the seconds alone."""
        return self.cost or Spent(seconds=self.seconds)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean accuracy, in [0, 1]."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation; nan for one seed."""
        return statistics.stdev(self.accuracies) if self.n > 1 else math.nan

    def __str__(self) -> str:
        """Mean ± standard deviation in percent, such as "47.1 ± 0.3"."""
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f}" if self.n > 1 else f"{100 * self.mean:.1f}"


_log = logging.getLogger(__name__)


class EvaluateWorker:
    """Worker that trains and scores fresh networks on one data set."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster = cluster
        self._dataset = dataset
        self._experts: dict[str, ExpertNetworks] = {}
        self._teachers: dict[str, nn.Module] = {}
        self._has_noted = False
        """True once a note on compilation was given."""

    def evaluate(
        self,
        config: RunConfig,
        store_uri: str,
        folder_uri: str,
        result_uris: Sequence[str],
        row: str,
        numbers: Sequence[int],
        network: NetworkConfig | None = None,
    ) -> Iterator[Progress | Note | Finished]:
        """Score one row with some seeds. A result's file is written last, so an existing file is complete.

        Args:
            config: recipe of the run.
            store_uri: store of the experts, for soft labels of random images.
            folder_uri: folder with the distilled set.
            result_uris: file to write for each seed; an existing file stays unchanged.
            row: key of `ROWS` or `FAIR_ROWS`.
            numbers: numbers of the seeds, from 0.
            network: network to score with the learned and with a tuned step size; `None` scores the backbone with
                the learned one. With AdamW there is no learned step size.
        """
        account, meter = Account(self._device, self._cluster), Meter(self._device)
        seeds = [derive_seed(config.seed, Purpose.EVALUATION, number) for number in numbers]
        folder = open_location(folder_uri)
        alike = row in DISTILLED or row == "full"  # one set for all seeds, so it is read and copied to the device once
        some = seeds[:1] if alike else seeds
        sets = [self._training_set(config, store_uri, folder, row, seed, network) for seed in some]
        sets *= len(seeds) if alike else 1
        step_size = sets[0][2] if has_learned_step_size(config, row) else None
        schedules = _schedules(config, row, step_size, network)
        lessons = self._lessons(config, store_uri, row, folder, sets[0][0])
        trials = yield from self._trials(network or config.network, sets, schedules, seeds, meter, lessons)
        tested = [self._tested(each, learns=bool(step_size)) for each in trials]
        spent, results = account.spent().share(1 / len(seeds)), list[dict[str, Any]]()
        for number, seed, uri, (chosen, of_test, with_learned) in zip(numbers, seeds, result_uris, tested, strict=True):
            result = {
                "row": row,
                "number": number,
                "seed": seed,
                "test_accuracy": of_test,
                "test_accuracy_with_learned_step_size": with_learned,
                "validation_accuracy": chosen.validation_accuracy,
                "step_size": chosen.step_size,
                "learned_step_size": step_size,
                "images": len(sets[0][0]),
                "seconds": spent.seconds,
                "cost": spent.to_json(),
                "provenance": provenance(self._device),
            }
            results.append(result)
            self._write(open_location(uri), result, config.name, len(schedules))
        yield Finished(results, meter.measure())

    def _write(self, place: Location, result: dict[str, Any], run: str, candidates: int) -> None:
        if not place.exists():
            place.write_json(result)
            values = {key: result[key] for key in ("row", "number", "step_size", "seconds")}
            scored = fields(run=run, accuracy=result["test_accuracy"], candidates=candidates)
            _log.info("network scored %s %s", scored, fields(**values))

    def _trials(
        self,
        network: NetworkConfig,
        sets: Sequence[tuple[Images, Tensor, float | None]],
        schedules: Sequence[Schedule],
        seeds: Sequence[int],
        meter: Meter,
        lessons: Lessons | None,
    ) -> Generator[Progress | Note, None, list[list[_Trial]]]:
        """Train fresh networks by each schedule and score them on validation images. Returns each seed's trials."""
        dataset, trials = self._dataset, [list[_Trial]() for _ in seeds]
        spec = network.for_images(dataset.channels, dataset.size, dataset.classes)
        images, targets = [each[0] for each in sets], [each[1] for each in sets]
        done, epochs = 0, len(seeds) * sum(schedule.epochs for schedule in schedules)
        yield Progress(done, epochs)
        for schedule in schedules:
            fresh = [build_network(spec, seed).to(self._device) for seed in seeds]
            trainer = trainer_of(self._cluster)
            yield from reported(trainer.train(fresh, images, targets, schedule, seeds, lessons), done, epochs)
            if trainer.note and not self._has_noted:
                self._has_noted = True
                yield Note(trainer.note)
            done += len(seeds) * schedule.epochs
            measured = [self._validation_accuracy(each) for each in fresh]
            for own, each, share in zip(trials, fresh, measured, strict=True):
                own.append(_Trial(each, schedule.learning_rate, share))
            mean = statistics.fmean(measured)
            metrics = meter.measure() | {"datm_ray_evaluate_validation_accuracy_ratio": mean}
            yield Progress(done, epochs, {"validation": mean}, metrics)
        return trials

    def _tested(self, trials: Sequence[_Trial], *, learns: bool) -> tuple[_Trial, float, float | None]:
        """Returns the trial best on validation data, its test accuracy, and the first trial's test accuracy.

        The last value is `None` if `learns` is False. If it is True, the first trial has the learned step size.
        """
        chosen = max(trials, key=lambda trial: trial.validation_accuracy)
        tested = self._test_accuracy(chosen)
        if not learns:
            return chosen, tested, None
        return chosen, tested, tested if chosen is trials[0] else self._test_accuracy(trials[0])

    def _test_accuracy(self, trial: _Trial) -> float:
        images = images_on(self._dataset.test_images, self._device)
        return accuracy(trial.network, images, to_device(self._dataset.test_labels, self._device))

    def _training_set(
        self, config: RunConfig, store_uri: str, folder: Location, row: str, seed: int, network: NetworkConfig | None
    ) -> tuple[Images, Tensor, float | None]:
        """Return (images, targets, step size). The step size is `None` if it must be chosen on validation data."""
        if row in DISTILLED:
            artifact = read_artifact(folder / SYNTHETIC)
            learned = _learned_step_size(artifact, config, network)
            targets = artifact.labels if row == "distilled-hard" else artifact.soft_labels
            return artifact.images.to(self._device), targets.to(self._device), learned
        all_images, all_labels = self._dataset.train_images, self._dataset.train_labels
        if row == "full":
            return images_on(all_images, self._device), to_device(all_labels, self._device), None
        rows = random_rows(all_labels, config.distill.ipc, seed)
        images, labels = to_device(all_images[rows], self._device), to_device(all_labels[rows], self._device)
        if row == "random-hard" or is_taught(config, row):
            return images, labels, None
        return images, self._expert_networks(config, store_uri).soft_labels(images, labels), None

    def _expert_networks(self, config: RunConfig, store_uri: str) -> ExpertNetworks:
        if config.name not in self._experts:
            self._experts[config.name] = ExpertNetworks(config, self._dataset, store_uri, self._device)
        return self._experts[config.name]

    def _lessons(self, config: RunConfig, store_uri: str, row: str, folder: Location, images: Images) -> Lessons | None:
        """Teacher of a row's networks; `None` if they learn from their set's own labels. `PLAIN` rows have no CutMix.

        Args:
            folder: folder of the run.
            images: the row's images.
        """
        if not is_taught(config, row):
            return None
        if is_stored(config, row):
            assert isinstance(images, Tensor)  # a synthetic set, or as many real images
            place = labels_location(folder, config, self._dataset.fingerprint)
            return StoredLessons(ReplayedLabels(images, LabelStore(place)), config.evaluate.temperature)
        if config.name not in self._teachers:
            experts = ExpertNetworks(teacher_of(config), self._dataset, store_uri, self._device)
            self._teachers[config.name] = experts.restored(0)
        settings = config.evaluate
        cutmix = 0.0 if row in PLAIN else settings.cutmix
        return Teacher(self._teachers[config.name], settings.temperature, cutmix)

    def _validation_accuracy(self, network: nn.Module) -> float:
        images = images_on(self._dataset.validation_images, self._device)
        return accuracy(network, images, to_device(self._dataset.validation_labels, self._device))


def is_taught(config: RunConfig, row: str) -> bool:
    """True if a teacher gives the labels of a row."""
    return config.evaluate.labels != "own" and row in SOFT


def is_stored(config: RunConfig, row: str) -> bool:
    """True if the labels of a row are stored beside the set. Other taught rows ask the teacher during training."""
    return config.evaluate.labels == "stored" and row == "distilled"


def has_learned_step_size(config: RunConfig, row: str) -> bool:
    """True if a row uses the step size learned with the set, alone or as one of several candidates."""
    is_given = row in SOFT and config.evaluate.learning_rate is not None
    is_replaced = is_given or is_taught(config, row)
    is_there = method_of(config).gives_step_size and config.evaluate.optimiser == "sgd"
    return row in DISTILLED and is_there and not is_replaced


def _schedules(config: RunConfig, row: str, learned: float | None, network: NetworkConfig | None) -> list[Schedule]:
    """Candidate schedules of a row, which differ in the step size alone. Validation chooses one.

    There is one candidate if the step size was learned with this network and these labels. For rows with soft labels,
    there is also one candidate if `evaluate.learning_rate` is given.

    Args:
        learned: step size that was learned with the set, if any.
        network: scored network; `None` for the backbone.
    """
    given, is_its_own = config.evaluate.learning_rate, network is None and row != "distilled-hard"
    others = ADAMW_STEP_SIZES if config.evaluate.optimiser == "adamw" else CONTROL_STEP_SIZES
    if given is not None and row in SOFT:
        rates: tuple[float, ...] = (given,)
    elif learned:
        rates = (learned,) if is_its_own else (learned, *others)
    else:
        rates = others
    schedule = row_schedule(config, row)
    return [dataclasses.replace(schedule, learning_rate=rate) for rate in rates]


def row_schedule(config: RunConfig, row: str) -> Schedule:
    """Training schedule of a row's networks, except for the step size."""
    if row == "full":
        config = config.model_copy(update={"evaluate": _by_protocol(config.evaluate)})
    schedule = evaluation_schedule(config, 0.0)
    if config.evaluate.optimiser == "adamw":
        schedule = schedule.with_adamw(config.evaluate.weight_decay)
    if row == "full":
        epochs = config.evaluate.real_epochs
        schedule = dataclasses.replace(schedule, epochs=epochs, decay_epoch=(epochs + 1) // 2)
    if config.evaluate.labels == "stored" and row in SOFT:  # like the stored views
        schedule = dataclasses.replace(schedule, augmentation="resized+flip")
    return dataclasses.replace(schedule, augmentation="") if row in PLAIN else schedule


def _by_protocol(settings: EvaluateConfig) -> EvaluateConfig:
    """Copy of the settings with the protocol's training: all `SCORING_KEYS` have their defaults."""
    fields = EvaluateConfig.model_fields
    return settings.model_copy(update={key: fields[key].default for key in SCORING_KEYS})


def scored_rows(config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
    """Rows that a run is scored on, each with its network; `None` for the backbone."""
    is_labelled, is_full = bool(trained_backbones(config)), config.evaluate.full
    rows = [row for row in ROWS if (row != "full" or is_full) and (row != "random-soft" or is_labelled)]
    rows += FAIR_ROWS if config.evaluate.fair else ()
    on_others = ON_OTHERS if is_labelled else UNLABELLED_ON_OTHERS
    others = ((row, network) for network in config.scored_networks for row in on_others)
    return [*((row, None) for row in rows), *others]


def training_of(config: RunConfig, row: str, network: NetworkConfig | None) -> tuple[int, Schedule]:
    """Number of networks that are trained for a row with one seed, and their schedule without its step size.

    Args:
        network: scored network; `None` for the backbone.
    """
    schedules = _schedules(config, row, 1.0 if has_learned_step_size(config, row) else None, network)
    return len(schedules), row_schedule(config, row)


def seeds_of_tasks(config: RunConfig, row: str, spec: NetworkSpec, images: int, least: int) -> list[tuple[int, ...]]:
    """Numbers of the seeds in each task of a row: one seed, or several if their networks can be trained in a stack.

    Args:
        spec: scored network.
        images: number of training images.
        least: fewest tasks to make, if there are as many seeds.
    """
    seeds = parts = config.evaluate.seeds
    may_stack = config.cluster.compile and not is_taught(config, row)
    if may_stack and _are_together(spec, seeds, images, row_schedule(config, row)):
        parts = min(seeds, max(least, -(-seeds // LARGEST_STACK)))
    return [tuple(part.tolist()) for part in np.array_split(np.arange(seeds), parts)]


@functools.lru_cache(maxsize=64)
def _are_together(spec: NetworkSpec, networks: int, images: int, schedule: Schedule) -> bool:
    image = (spec.channels, *spec.size)
    return are_trained_together(build_network(spec, 0), networks, image, images, schedule)


def work_of(config: RunConfig, row: str, network: NetworkConfig | None, classes: int, real: int, flop: float) -> float:
    """Expected work of training the networks of a row with one seed, in operations of forward passes.

    Args:
        network: scored network; `None` for the backbone.
        classes: number of classes.
        real: number of real training images.
        flop: operations of one image in a forward pass through the network.
    """
    count, schedule = training_of(config, row, network)
    images = real if row == "full" else config.distill.ipc * classes
    return count * work_of_training(schedule, images, flop)


@dataclass(frozen=True)
class _Trial:
    """Network trained with one of the candidate learning rates."""

    network: nn.Module
    step_size: float
    validation_accuracy: float


def _learned_step_size(artifact: Artifact, config: RunConfig, network: NetworkConfig | None) -> float:
    """Step size learned with this network if it was matched, otherwise with the first backbone."""
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
    """File of the result of one row and seed.

    Controls do not depend on the distillation, so runs share them. Runs with the same network share the row on all real
    data. Runs share rows on random images if they also have the same experts and number of images per class. Training
    settings other than the protocol's have folders of their own.

    Args:
        out: output folder of the run.
        config: recipe of the run.
        dataset_fingerprint: fingerprint of the data set.
        row: key of `ROWS` or `FAIR_ROWS`.
        number: number of the seed, from 0.
        network: scored network; `None` for the backbone.
    """
    if row in DISTILLED:
        folder = out / config.name / "evaluation"
    else:
        identity = run_identity(config)
        identity.pop("method", None)
        for section in ("name", "distill", "recover", "select", "metadd", *(["experts"] if row == "full" else [])):
            identity.pop(section, None)
        ipc = {} if row == "full" else {"ipc": config.distill.ipc}
        folder = out / "controls" / stable_hash({"dataset": dataset_fingerprint, **identity, **ipc})
    if config.evaluate.optimiser != "sgd":
        folder = folder / config.evaluate.optimiser
    if training := _training_identity(config, dataset_fingerprint, row):
        folder = folder / f"trained-{stable_hash(training)}"
    if network is not None:
        folder = folder / f"{network.architecture}-{stable_hash(network.model_dump())}"
    return folder / f"{row}-{number:02d}.json"


def _training_identity(config: RunConfig, dataset_fingerprint: str, row: str) -> dict[str, Any]:
    """Training settings of a row that differ from the protocol's, and the fingerprint of its teacher's experts."""
    identity = scoring_identity(config)
    if row == "full":
        return {}
    left_out = {"temperature", "cutmix", "keep_labels", "top_logits"}
    if is_taught(config, row):
        left_out = set() if is_stored(config, row) else {"keep_labels", "top_logits"}
        identity["teacher"] = expert_fingerprint(teacher_of(config), dataset_fingerprint)
    elif row not in SOFT:
        left_out |= {"labels", "learning_rate"}
    return {key: value for key, value in identity.items() if key not in left_out}


@dataclass(frozen=True)
class NetworkScores:
    """Scores of a set on one architecture."""

    network: NetworkConfig
    kind: str
    """"same": the backbone; "seen": matched or a MetaDD network of the distillation; "unseen": neither."""
    learned: Score | None
    """Score with the learned step size; `None` without one, as with AdamW or a teacher's labels."""
    tuned: Score
    """Score with a step size chosen on validation data, which may be the learned one."""
    control: Score | None
    """Score of random real images with a tuned step size, and soft labels if experts exist; `None` if unfinished."""


def read_network_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[NetworkScores]:
    """Scores on other architectures, in the recipe's order. Architectures with unfinished seeds are left out."""
    scores = []
    for network in config.scored_networks:
        rows = (*ON_OTHERS, "random-hard")
        results = {row: _read_all_seeds(out, config, dataset_fingerprint, row, network) for row in rows}
        if distilled := results["distilled"]:
            learned = [dataclasses.replace(each, accuracy=each.with_learned_step_size) for each in distilled]
            row = "random-soft" if results["random-soft"] else "random-hard"
            control = results[row]
            scores.append(
                NetworkScores(
                    network,
                    _kind(network, config),
                    _score("distilled", learned) if has_learned_step_size(config, "distilled") else None,
                    _score("distilled", distilled),
                    _score(row, control) if control else None,
                )
            )
    return scores


@dataclass(frozen=True)
class _Result:
    """Content of one result's file."""

    accuracy: float
    """Test accuracy, in [0, 1]."""
    with_learned_step_size: float
    """Test accuracy with the learned step size; nan if there is none."""
    seconds: float
    cost: Spent | None
    """Cost; `None` if an earlier version of this package wrote the file."""

    @classmethod
    def read(cls, place: Location) -> _Result:
        content = place.read_json()
        with rejecting_nonsense(place):
            learned = content.get("test_accuracy_with_learned_step_size")
            return cls(
                float(content["test_accuracy"]),
                math.nan if learned is None else float(learned),
                float(content["seconds"]),
                Spent.from_json(content["cost"]) if "cost" in content else None,
            )


def _read_all_seeds(
    out: Location, config: RunConfig, dataset_fingerprint: str, row: str, network: NetworkConfig | None = None
) -> list[_Result]:
    """Results of all seeds; empty if one is missing."""
    seeds = range(config.evaluate.seeds)
    places = [result_location(out, config, dataset_fingerprint, row, number, network) for number in seeds]
    return [_Result.read(place) for place in places] if all(place.exists() for place in places) else []


def _kind(network: NetworkConfig, config: RunConfig) -> str:
    if network == config.network:
        return "same"
    seen = [backbone.network for backbone in config.backbones]
    return "seen" if network in (*seen, *(config.metadd.auxiliaries if config.metadd else ())) else "unseen"


def read_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[Score]:
    """Rows for which every seed is finished, in the table's order."""
    return [score for row in ROWS if (score := read_score(out, config, dataset_fingerprint, row))]


@dataclass(frozen=True)
class FairScores:
    """DD-Ranking's scores of a set, one per seed."""

    label: tuple[LabelRobust, ...]
    augmentation: tuple[AugmentationRobust, ...]

    def parts(self) -> dict[str, tuple[float, ...]]:
        """Both scores and their parts: key of `FAIR_PARTS` -> one value per seed."""
        return {
            "LRS": tuple(each.score for each in self.label),
            "HLR": tuple(each.hlr for each in self.label),
            "IOR": tuple(each.ior for each in self.label),
            "ARS": tuple(each.score for each in self.augmentation),
            "beta": tuple(each.beta for each in self.augmentation),
        }


FAIR_PARTS = {
    "LRS": "label-robust score",
    "HLR": "hard-label recovery: all real data − distilled, both with hard labels; lower is better",
    "IOR": "improvement over random: distilled − random real images, both with soft labels",
    "ARS": "augmentation-robust score",
    "beta": "distilled − random real images, mean of augmented and not",
}
"""Keys of `FairScores.parts` -> meaning."""


def read_fair_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> FairScores | None:
    """DD-Ranking's scores; `None` if the recipe does not set `evaluate.fair` or a row is unfinished."""
    rows = ("full", "random-soft", "distilled", *FAIR_ROWS)
    found = (
        {row: _read_all_seeds(out, config, dataset_fingerprint, row) for row in rows} if config.evaluate.fair else {}
    )
    if not found or not all(found.values()):
        return None
    of = {row: [result.accuracy for result in results] for row, results in found.items()}
    label = tuple(
        label_robust(real_hard=real, distilled_hard=hard, distilled=own, random_soft=random)
        for real, hard, own, random in zip(
            of["full"], of["distilled-hard"], of["distilled"], of["random-soft"], strict=True
        )
    )
    augmentation = tuple(
        augmentation_robust(distilled=own, random=random, distilled_plain=own_plain, random_plain=random_plain)
        for own, random, own_plain, random_plain in zip(
            of["distilled"], of["random-soft"], of["distilled-plain"], of["random-plain"], strict=True
        )
    )
    return FairScores(label, augmentation)


def read_fair_rows(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[Score]:
    """Rows of `FAIR_ROWS` for which every seed is finished; empty without `evaluate.fair`."""
    rows = FAIR_ROWS if config.evaluate.fair else ()
    return [score for row in rows if (score := read_score(out, config, dataset_fingerprint, row))]


def read_score(
    out: Location, config: RunConfig, dataset_fingerprint: str, row: str, network: NetworkConfig | None = None
) -> Score | None:
    """Score of a row; `None` if a seed is missing. On a given `network`, it is the score with the tuned step size."""
    results = _read_all_seeds(out, config, dataset_fingerprint, row, network)
    return _score(row, results) if results else None


def _score(row: str, results: Sequence[_Result]) -> Score:
    costs = [result.cost for result in results if result.cost is not None]
    return Score(
        row,
        tuple(result.accuracy for result in results),
        sum(result.seconds for result in results),
        total(costs) if len(costs) == len(results) else None,
    )
