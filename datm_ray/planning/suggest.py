"""Recipe for a user's own images: every value is computed from the data, the images per class, and the user's time.

`suggest` applies the rules; docs/your-images.md lists them with their sources. `datm-ray init` writes the recipe with a
reason beside every value. Tests: tests/planning/test_suggest.py.

The rules compare data sets by the distance that plain SGD can go: learning rate times steps. For 45,000 images in
batches of 256, an epoch has distance 1.76; for 900 images in batches of 32, with twice the learning rate, 0.58.
Measured in distances, the published ranges of start epochs and the digits' ranges nearly agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from datm_ray.config import PUBLISHED_AUGMENTATION, DatasetConfig, RunConfig, with_settings
from datm_ray.config.files import plain_name, to_yaml_with_reasons
from datm_ray.data.decode import image_suffixes
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.splits import held_out
from datm_ray.errors import DatasetError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import Machine, machine_here
from datm_ray.planning.measure import measured
from datm_ray.planning.memory import plans_of
from datm_ray.planning.shape import DataShape
from datm_ray.runtime.executor import counted
from datm_ray.stages.experts import experts_at_a_time

EPOCH_STEPS = 25
"""Smallest number of steps in an epoch of the experts, unless the batch would become smaller than `SMALLEST_BATCH`."""
SMALLEST_BATCH, PUBLISHED_BATCH = 16, 256
"""Smallest and largest batch size of experts, inclusive. The largest is the published batch size."""
PUBLISHED_RATE, RATE = 0.01, 0.02
"""Experts' learning rate: the published rate for the published batch size; the digits' rate for smaller batches."""
BOUND, BOUND_POWER = 8.0, 0.57
"""The range of start epochs ends at distance (learning rate times steps) BOUND * ipc ** BOUND_POWER from epoch 0.

DATM's CIFAR-10 recipes end at 7 (IPC 1), 35 (10) and 70 (50), the digits' recipes at 9 (1) and 28 (10)."""
LATE_SHARE, MOST_LATE = 3.0, 0.5
"""Start of the range of start epochs, as a share of its end: LATE_SHARE times the set's share of the real images, at
most MOST_LATE.

Examples: 0.03 for CIFAR-10 with 50 of 5,000 images per class, 0.3 with 500 (DATM has 0 and 0.67); 0.2 for
digits-ipc10."""
TRAINED = 35.0
"""Smallest distance (learning rate times number of steps) that the experts of a suggested recipe are trained for.

Experts also label the first images, which may need more training than the matched epochs. The digits' experts have
38."""
STEP_DISTANCE = 0.06
"""Expert's distance (learning rate times steps) that one student step must cover.

DATM's recipes have 0.044, the digits' recipes 0.07 to 0.1."""
STUDENT_BATCH = 50
"""Smallest number of images in a student step, or two per class if those are more; at most the whole set."""
THRESHOLD = 1.1
"""Matching loss above which an iteration is skipped, as in DATM's cifar10-ipc1.

If a set hardly moves the student, losses scatter around 1."""
VALIDATION, MOST_VALIDATION = 0.1, 5000
"""Share of the images for validation, and largest number of validation images."""
LARGEST_SIDE = 64
"""Side in pixels to which larger images are resized. Larger images have no published results."""
WIDTHS, STEPS = (128, 64, 32, 16), (40, 20, 10)
"""Widths of the network, in channels, and numbers of student steps, in the order of trying them."""
ENOUGH_EXPERTS, ENOUGH_ITERATIONS = 4, 300
"""A width of the network is chosen if the time is enough for these numbers of experts and iterations."""
MOST_EXPERTS, MOST_ITERATIONS = 100, 10_000
"""Largest numbers of experts and iterations, as published."""
LEAST_EXPERTS, LEAST_ITERATIONS = 2, 20
"""Smallest numbers of experts and iterations, even if the time is too short for them."""
EXPERTS_SHARE, EVALUATION_SHARE, REAL_SHARE = 0.35, 0.2, 0.1
"""Largest shares of the time: for experts, for evaluation, and for the evaluation's networks on all real images.
Distillation gets the rest."""
MARGIN = 0.85
"""Share of the time that is planned. The rest is a reserve for work that the estimates leave out."""
EXACT_FROM = 900.0
"""Time wanted for the whole run, in seconds, from which on compiled steps are timed. Compiling and timing take about a
minute, and the run finds its steps compiled. For a shorter run, uncompiled steps are timed within seconds."""
SMALLEST_PICTURE = 24
"""Smallest side in pixels, inclusive, of images that get all operations of augmentation."""
EVALUATIONS = (("published", 5), ("short", 5), ("brief", 5), ("brief", 3))
"""Pairs (evaluation protocol, networks for each row of the accuracy table), in the order of trying them."""
VALIDATIONS, CHECKPOINTS = 5, 20
"""Number of validations and number of checkpoints in a distillation."""


@dataclass(frozen=True)
class Suggestion:
    """Recipe with a reason for every chosen value."""

    config: RunConfig
    reasons: dict[str, str]
    """Key, such as `experts.batch_size` -> reason for its value."""
    plan: Proposal
    """Memory, time and storage that the recipe takes on this machine."""

    def __str__(self) -> str:
        """Recipe as YAML, with the reasons as comments."""
        head = f"# Planned for this machine when it was written: {self.plan.lines()[0]}\n"
        head += "# A distance is learning rate x steps: how far plain SGD can go.\n"
        return head + to_yaml_with_reasons(self.config, self.reasons)


@dataclass(frozen=True)
class Wish:
    """A user's request for a recipe."""

    name: str
    """Name of the run."""
    ipc: int
    """Synthetic images per class."""
    seconds: float
    """Seconds on the clock for the whole run, from the first expert to the report."""


def default_name(path: str, ipc: int) -> str:
    """Default name of a run, from the path of its images and the images per class."""
    return plain_name(f"{Path(path).expanduser().absolute().stem}-ipc{ipc}")


def source_of(path: str) -> str:
    """Choose the `dataset.source` for the files at a path.

    Returns "folder", "parquet", or the name of a data set whose official layout the path has.
    """
    place = Path(path).expanduser()
    if not place.exists() and path in ("digits", "cifar10", "cifar100", "tiny-imagenet"):
        return path
    if place.suffix == ".parquet" or (_holds(place, {".parquet"}) and not _holds(place, image_suffixes())):
        return "parquet"
    names = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100", "wnids.txt": "tiny-imagenet"}
    return next((source for name, source in names.items() if place.name == name or _has(place / name)), "folder")


def _holds(folder: Path, suffixes: Collection[str]) -> bool:
    """True if a folder has files with one of the suffixes, up to two folders deep; False if it cannot be read."""
    with suppress(OSError):
        return any(file.suffix.lower() in suffixes for deep in ("*", "*/*", "*/*/*") for file in folder.glob(deep))
    return False


def _has(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def read_images(path: str, resize: int | None) -> tuple[DatasetConfig, RawDataset]:
    """Read the images at a path. Returns them with the section `dataset` of a recipe that reads them.

    Args:
        resize: side in pixels of the images. `None` keeps the size of images that all have one size of at most 64
            pixels, and resizes others to 64x64.

    Raises:
        DatasetError: the path has no images that can be read.
    """
    source = source_of(path)
    found = None if source == path else str(Path(path).expanduser().absolute())
    dataset = DatasetConfig(source=source, path=found, resize=resize)
    try:
        # Larger images are refused by their headers, so that they are decoded once: below, to their new size.
        raw = load_raw(dataset.source, dataset.path, resize=resize, copies=2, largest=resize or LARGEST_SIDE)
        if resize is not None or max(raw.size) <= LARGEST_SIDE:
            return dataset, raw
    except DatasetError as failure:
        if resize is not None or "dataset.resize" not in failure.remedy:
            raise
    return read_images(path, LARGEST_SIDE)


Planner = Callable[[RunConfig, bool], Proposal]
"""Plans a recipe on this machine, with measured speeds. Arguments: the recipe; True to time compiled steps."""


def suggest(wish: Wish, dataset: DatasetConfig, raw: RawDataset, plan: Planner) -> Suggestion:
    """Choose a recipe for the user's images and time.

    Args:
        wish: images per class and time.
        dataset: source, path and size of the images.
        raw: the images.
        plan: plans a recipe on this machine.

    Raises:
        DatasetError: a class has too few images.
    """
    draft = _Draft(wish, dataset, raw, plan)
    draft.set("name", wish.name, "names the run's folder")
    for rule in (_data, _experts, _matching):
        for key, value, reason in rule(draft):
            draft.set(key, value, reason)
    _fit_into_time(draft)
    config = draft.config()
    return Suggestion(config, draft.reasons, draft.plan(config))


def measured_plans(raw: RawDataset, say: Callable[[str], None]) -> Planner:
    """Make a planner of recipes for these images on this machine. It times each width of the network once.

    Args:
        say: shows a line to the user before each measurement.
    """
    image, training = (raw.channels, *raw.size), len(raw.train) + len(raw.validation)
    shape = DataShape(image, raw.classes, training, len(raw.test))
    machines: dict[tuple[int, bool], Machine] = {}

    def plan(config: RunConfig, exactly: bool) -> Proposal:
        config = config.resolved(raw.size)
        found = Proposal(config, shape, plans_of(config, shape), machine_here(config))
        key = config.network.width, exactly or found.machine.device == "GPU"
        if key not in machines:
            how = "compiling and timing the run's own steps" if key[1] else "timing small steps"
            say(f"{how}, of a network with {key[0]} channels ...")
            machines[key] = measured(found, quickly=not key[1])
        return replace(found, machine=machines[key])

    return plan


Choices = Iterator[tuple[str, Any, str]]
"""Type of a rule's result: an iterator over (key of the recipe, value, reason)."""


@dataclass
class _Draft:
    """Unfinished recipe: the values chosen so far, with their reasons."""

    wish: Wish
    dataset: DatasetConfig
    raw: RawDataset
    planner: Planner
    exactly: bool = False
    """True to plan with the times of compiled steps."""
    values: dict[str, Any] = field(default_factory=dict)
    """Key, such as `experts.batch_size` -> value."""
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Choose a value for a key, for a reason."""
        self.values[key], self.reasons[key] = value, reason

    def config(self, values: dict[str, Any] | None = None) -> RunConfig:
        """Make a recipe from the values chosen so far and from `values`, which replace chosen values of equal keys."""
        return with_settings(RunConfig(dataset=self.dataset), self.values | (values or {}))

    def plan(self, config: RunConfig) -> Proposal:
        """Plan a recipe on this machine."""
        return self.planner(config, self.exactly)

    def clock(self, values: dict[str, Any]) -> dict[str, float]:
        """Stage -> seconds on the clock, for the recipe with these values, see `config`."""
        return self.plan(self.config(values)).clock

    @property
    def images(self) -> int:
        """Number of synthetic images."""
        return self.wish.ipc * self.raw.classes

    @property
    def counts(self) -> list[int]:
        """Number of images of each class for training and validation together."""
        parts = (self.raw.train, self.raw.validation)
        labels = np.concatenate([part.labels for part in parts])
        return [int(count) for count in np.bincount(labels, minlength=self.raw.classes)]

    @property
    def training(self) -> int:
        """Number of images that experts are trained on, without validation images."""
        share = self.values["dataset.validation"]
        return sum(count - held_out(count, share) for count in self.counts)

    @property
    def epoch(self) -> float:
        """Distance of one epoch of the experts: learning rate times steps. (`Distance` needs a whole recipe.)"""
        rate = float(self.values["experts.learning_rate"])
        return rate * math.ceil(self.training / int(self.values["experts.batch_size"]))


def _data(draft: _Draft) -> Choices:
    dataset = draft.dataset
    images = f"{sum(draft.counts):,} images to train and validate on, {len(draft.raw.test):,} to test"
    yield "dataset.source", dataset.source, images
    if dataset.path is not None:
        yield "dataset.path", dataset.path, "may be another one on another machine"
    if dataset.resize is not None:
        yield "dataset.resize", dataset.resize, "one size for all images; smaller ones take less time"
    ipc, smallest = draft.wish.ipc, min(draft.counts)
    name = draft.raw.class_names[draft.counts.index(smallest)]
    if ipc >= smallest:
        raise DatasetError(
            f"ipc is {ipc}, and class {name!r} has {smallest} images that are not for testing",
            "a set holds fewer images than its data, and one image of a class is for validation",
            f"ask for {max(1, (smallest - 1) // 2)} or fewer, or add images of this class",
        )
    share = min(VALIDATION, MOST_VALIDATION / sum(draft.counts))
    if held_out(smallest, share) > smallest - ipc:
        share, why = (
            (smallest - ipc) / smallest / 2,
            f"leaves {ipc} training images of class {name!r}, which has {smallest} in all",
        )
    else:
        why = "chooses the set to keep; the test images choose nothing"
    yield "dataset.validation", float(f"{share:.2g}"), why
    resolved, side = draft.config().resolved(draft.raw.size), min(draft.raw.size)
    kind = resolved.dataset.normalisation
    why = "whitening, as published up to 64x64 pixels" if kind == "zca" else "whitening takes long above 64x64"
    yield "dataset.normalisation", kind, why
    yield "network.depth", resolved.network.depth, f"blocks; each halves the {side} pixels, and maps keep 3 or more"


def _experts(draft: _Draft) -> Choices:
    batch = 2 ** int(math.log2(max(1, draft.training / EPOCH_STEPS)))
    batch = min(max(SMALLEST_BATCH, batch), PUBLISHED_BATCH)
    steps, published = math.ceil(draft.training / batch), batch == PUBLISHED_BATCH
    yield "experts.batch_size", batch, f"an epoch of {draft.training:,} images then has {counted(steps, 'step')}"
    yield (
        "experts.learning_rate",
        PUBLISHED_RATE if published else RATE,
        "as published" if published else "twice the published rate, because there are fewer steps",
    )
    side, is_grey = min(draft.raw.size), draft.raw.channels == 1
    if side >= SMALLEST_PICTURE:
        every = PUBLISHED_AUGMENTATION.removeprefix("color_") if is_grey else PUBLISHED_AUGMENTATION
        why = "as published" + (" but for colour, which grey images lack" if is_grey else "")
        yield from ((f"{section}.augmentation", every, why) for section in ("experts", "distill", "evaluate"))
        return
    for section in ("experts", "distill"):
        yield f"{section}.augmentation", "", "none, as for the digits, where none gave better sets"
    yield "evaluate.augmentation", "crop_scale_rotate", f"at {side} pixels cutout and flip would make other pictures"


def _matching(draft: _Draft) -> Choices:
    ipc, epoch, share = draft.wish.ipc, draft.epoch, draft.images / draft.training
    yield "distill.ipc", ipc, "as asked for"
    distance = BOUND * ipc**BOUND_POWER
    bound = max(2, round(distance / epoch))
    first = int(bound * min(MOST_LATE, LATE_SHARE * share))
    late = f"; begins later because the set is {share:.0%} of the data" if first else ""
    why = f"ends at distance {distance:.0f}, known to suit {counted(ipc, 'image')} per class{late}"
    yield "distill.start_epochs", [first, bound], why
    batch = min(draft.images, max(STUDENT_BATCH, 2 * draft.raw.classes))
    whole = batch == draft.images
    yield "distill.batch_size", batch, "all images of the set" if whole else f"of {draft.images:,} images of the set"
    yield "distill.threshold", THRESHOLD, "a little above the loss of no movement, near which a set may start"
    found = "found by trial before the first iteration"
    yield "distill.initial_step_size", None, found
    yield "distill.learning_rate_images", None, found
    yield "distill.learning_rate_labels", 5.0, "as for digits, between the published 2 and 10"
    yield "distill.learning_rate_step_size", 5e-5, "as for digits"


def _lengths(draft: _Draft, steps: int) -> dict[str, Any]:
    """Values for a number of student steps: the epochs from start to target, and the experts' epochs."""
    span = max(1, round(STEP_DISTANCE * steps / draft.epoch))
    epochs = max(draft.values["distill.start_epochs"][1] - 1 + span, math.ceil(TRAINED / draft.epoch))
    return {
        "distill.student_steps": steps,
        "distill.expert_epochs": span,
        "experts.epochs": epochs,
        "experts.keep_epochs": epochs,
    }


def _fit_into_time(draft: _Draft) -> None:
    """Choose the width of the network and the numbers of experts, epochs, student steps and iterations.

    The largest width is taken for which the time is enough, see `ENOUGH_EXPERTS`.
    """
    time, is_long = MARGIN * draft.wish.seconds, draft.wish.seconds >= EXACT_FROM
    for width in WIDTHS:
        draft.exactly = False
        values, is_enough = _fitted(draft, width, time)
        if is_long and (is_enough or width == WIDTHS[-1]):
            draft.exactly = True
            values, is_enough = _fitted(draft, width, time)
        if is_enough:
            break
    reasons = _reasons(draft, values)
    for key, value in values.items():
        draft.set(key, value, reasons[key])


def _fitted(draft: _Draft, width: int, time: float) -> tuple[dict[str, Any], bool]:
    """Values with which the run takes about `time` seconds, and True if the time is enough, see `ENOUGH_EXPERTS`.

    The smallest allowed numbers may take longer.
    """
    values = {"network.width": width, **_lengths(draft, STEPS[-1])}
    here = min(machine_here(draft.config(values)).workers, draft.raw.classes)  # fewer images in a shard: slower steps
    workers = draft.plan(draft.config(values | {"cluster.shards": here})).machine.workers
    values["cluster.shards"] = min(workers, draft.raw.classes)
    values |= _evaluation(draft, values, time)
    stack = experts_at_a_time(draft.config(values), (draft.raw.channels, *draft.raw.size), draft.raw.classes)
    for steps in STEPS:
        values |= _lengths(draft, steps)
        values |= _numbers(draft, values, time, workers, stack)
        if values["distill.iterations"] >= ENOUGH_ITERATIONS:
            break
    if stack > 1:
        values["cluster.experts_at_a_time"] = min(stack, -(-values["experts.count"] // workers))
    values["distill.validate_every"] = -(-values["distill.iterations"] // VALIDATIONS)
    values["distill.checkpoint_every"] = -(-values["distill.iterations"] // CHECKPOINTS)
    is_enough = values["experts.count"] >= ENOUGH_EXPERTS and values["distill.iterations"] >= ENOUGH_ITERATIONS
    return values, is_enough


def _evaluation(draft: _Draft, values: dict[str, Any], time: float) -> dict[str, Any]:
    """Values of the longest evaluation within `EVALUATION_SHARE` of the time.

    Networks on all real images are added if they take at most `REAL_SHARE` of the time.
    """
    for protocol, seeds in EVALUATIONS:
        found = {"evaluate.protocol": protocol, "evaluate.seeds": seeds, "evaluate.full": False}
        seconds = draft.clock(values | found)["evaluation"]
        if seconds <= EVALUATION_SHARE * time:
            break
    real = {"evaluate.full": True, "evaluate.real_epochs": values["experts.epochs"]}
    if draft.clock(values | found | real)["evaluation"] - seconds <= REAL_SHARE * time:
        found |= real
    return found


def _numbers(draft: _Draft, values: dict[str, Any], time: float, workers: int, stack: int) -> dict[str, int]:
    """Numbers of experts and iterations that fill `time` seconds. If it is short, experts are cut before iterations.

    Args:
        workers: number of the machine's workers. A round of experts has one expert per worker.
        stack: number of experts that a worker trains at a time.
    """
    one, two = (draft.clock(values | {"experts.count": workers * stack * rounds})["experts"] for rounds in (1, 2))
    each, fixed = (two - one) / stack, 2 * one - two  # seconds of a round, and of compiling
    rounds = int((EXPERTS_SHARE * time - fixed) / each)
    count = min(max(LEAST_EXPERTS, workers * rounds), MOST_EXPERTS)
    few = {"experts.count": count, "distill.iterations": VALIDATIONS, "distill.validate_every": 1}
    short = draft.plan(draft.config(values | few))
    iteration = sum(short.iteration)
    iterations = VALIDATIONS + int((time - sum(short.clock.values())) / iteration)
    spare = max(0, count - ENOUGH_EXPERTS) // workers
    fewer = min(spare, max(0, math.ceil((ENOUGH_ITERATIONS - iterations) * iteration / each)))
    iterations += int(fewer * each / iteration)
    return {
        "experts.count": count - workers * fewer,
        "distill.iterations": min(max(LEAST_ITERATIONS, iterations), MOST_ITERATIONS),
    }


def _words(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _reasons(draft: _Draft, values: dict[str, Any]) -> dict[str, str]:
    """Key -> reason for the values that `_fitted` returns."""
    asked, width, iterations = _words(draft.wish.seconds), values["network.width"], values["distill.iterations"]
    steps, count, is_enough = values["distill.student_steps"], values["experts.count"], iterations >= ENOUGH_ITERATIONS
    span, reached = (draft.epoch * values[key] for key in ("distill.expert_epochs", "experts.epochs"))
    least = f"the least; {asked} would be too short for more"
    in_time = f"more would leave fewer than {ENOUGH_EXPERTS} experts or {ENOUGH_ITERATIONS} iterations in {asked}"
    return {
        "network.width": "channels, as published" if width == WIDTHS[0] else f"channels; {in_time}",
        "cluster.shards": "all workers of this machine distil the set together",
        "cluster.experts_at_a_time": "all workers train experts",
        "evaluate.protocol": f"the longest that takes at most a fifth of {asked}, or the shortest that trains networks",
        "evaluate.seeds": "networks of a row, for a mean and its deviation",
        "evaluate.full": "networks on all real images take at most a tenth of the time"
        if values["evaluate.full"]
        else "left out: networks on all real images take more than a tenth of the time",
        "evaluate.real_epochs": "as many as the experts have",
        "distill.student_steps": f"as many as leave {ENOUGH_ITERATIONS} iterations in {asked}" if is_enough else least,
        "distill.expert_epochs": f"distance {span:.2g}, for {steps} student steps",
        "experts.epochs": f"distance {reached:.0f}: beyond the latest target, and far enough to label images",
        "experts.keep_epochs": "all epochs, so that recipes with more images per class can share the experts",
        "experts.count": "as many as the time allows beside the iterations" if count > LEAST_EXPERTS else least,
        "distill.iterations": "as many as the rest of the time allows" if iterations > LEAST_ITERATIONS else least,
        "distill.validate_every": f"{VALIDATIONS} times, to choose the set to keep",
        "distill.checkpoint_every": f"about {min(CHECKPOINTS, iterations)} times; Ctrl-C saves too",
    }
