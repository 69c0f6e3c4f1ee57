"""A recipe for images of one's own: every value follows from the data, the images per class, and the time there is.

`suggest` has the rules; docs/your-images.md lists them with their sources. `datm-ray init` writes the recipe with a
reason beside every value. Tests: tests/planning/test_suggest.py.

The unit that makes data sets comparable is the distance that plain SGD can go: learning rate times steps. An epoch of
45,000 images in batches of 256 is 1.76, an epoch of 900 images in batches of 32 and with twice the rate 0.58. Published
ranges of start epochs, and those of the digits, nearly agree in this unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from datm_ray.config import PUBLISHED_AUGMENTATION, DatasetConfig, RunConfig, with_settings
from datm_ray.config.files import plain_name, to_yaml_with_reasons
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.errors import DatasetError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.fit import DataShape, Layout, plans_of
from datm_ray.planning.machines import Machine, machine_here
from datm_ray.planning.measure import measured

EPOCH_STEPS = 25
"""Steps that an epoch of the experts has at least, unless that needs a batch below the smallest."""
SMALLEST_BATCH, PUBLISHED_BATCH = 16, 256
"""Limits on an expert's batch; the largest is the published one."""
PUBLISHED_RATE, RATE = 0.01, 0.02
"""Experts' learning rate with the published batch, and with smaller ones, as for the digits."""
BOUND, BOUND_POWER = 8.0, 0.57
"""Distance at which the latest student starts with one image per class, and the power by which it grows with them.

DATM's CIFAR-10 recipes end at 7 (IPC 1), 35 (10) and 70 (50), the digits' at 9 (1) and 28 (10)."""
LATE_SHARE, MOST_LATE = 3.0, 0.5
"""The first start as a share of the bound: so many times the synthetic set's share of the data, and at most this.

0.03 for CIFAR-10 with 50 of 5,000 images per class, 0.3 with 500; DATM has 0 and 0.67. 0.2 for digits-ipc10."""
TRAINED = 35.0
"""Distance over which experts are trained at least, for they label the first images; 38 for digits."""
STEP_DISTANCE = 0.06
"""Distance of the experts that one student step makes up for: 0.044 in DATM's recipes, 0.07 to 0.1 for digits."""
STUDENT_BATCH = 50
"""Images of a student step at least, if the set has as many; two per class if those are more."""
THRESHOLD = 1.1
"""Threshold of DATM's cifar10-ipc1. Losses of a set that hardly moves the student scatter around 1."""
VALIDATION, MOST_VALIDATION = 0.1, 5000
"""Share of the images for validation, and their largest number."""
LARGEST_SIDE = 64
"""Side in pixels to which larger images are brought, the largest with published results."""
WIDTHS, STEPS = (128, 64, 32, 16), (40, 20, 10)
"""Channels of the network and numbers of student steps, in the order in which they are tried."""
ENOUGH_EXPERTS, ENOUGH_ITERATIONS = 4, 300
"""A width is taken if there is time for as many."""
MOST_EXPERTS, MOST_ITERATIONS, LEAST_ITERATIONS = 100, 10_000, 20
"""Limits; the largest are the published values."""
EXPERTS_SHARE, EVALUATION_SHARE, REAL_SHARE = 0.35, 0.2, 0.1
"""Largest shares of the time; distillation gets what is left. The last is that of networks on all real images."""
SEEDS = 5
"""Networks of a row, as usual."""
MARGIN = 0.85
"""Share of the time that is planned; the rest is for what estimates leave out."""
SMALLEST_PICTURE = 24
"""Side in pixels from which all operations of augmentation are used."""
PROTOCOLS = ("published", "short", "brief")
"""Evaluation protocols, in the order in which they are tried."""
VALIDATIONS, CHECKPOINTS = 5, 20
"""Numbers of validations and of checkpoints of a distillation."""


@dataclass(frozen=True)
class Suggestion:
    """A recipe with the reason of every value that was chosen."""

    config: RunConfig
    reasons: dict[str, str]
    """Keys such as `experts.batch_size` -> reason."""
    plan: Proposal
    """What it takes on this machine."""

    def __str__(self) -> str:
        """The recipe as YAML, with the reasons as comments."""
        lines = [f"# {line}" for line in str(self.plan).splitlines()]
        return "\n".join(lines) + "\n" + to_yaml_with_reasons(self.config, self.reasons)


@dataclass(frozen=True)
class Wish:
    """What a user asks for."""

    name: str
    """Name of the run."""
    ipc: int
    """Synthetic images per class."""
    seconds: float
    """Time on the clock for everything, from the first expert to the report."""


def default_name(path: str, ipc: int) -> str:
    """Name of a run on the images at a path."""
    return plain_name(f"{Path(path).expanduser().absolute().stem}-ipc{ipc}")


def source_of(path: str) -> str:
    """Source that reads the files at a path: `folder`, `parquet`, or a data set in its official layout."""
    place = Path(path).expanduser()
    if not place.exists() and path in ("digits", "cifar10", "cifar100", "tiny-imagenet"):
        return path
    if place.suffix == ".parquet" or (place.is_dir() and any(place.rglob("*.parquet"))):
        return "parquet"
    names = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100", "wnids.txt": "tiny-imagenet"}
    found = (source for name, source in names.items() if place.name == name or (place / name).exists())
    return next(found, "folder")


def read_images(path: str, resize: int | None) -> tuple[DatasetConfig, RawDataset]:
    """Read the images at a path. Without `resize`, images of one size up to 64 pixels keep it; others become 64x64.

    Raises:
        DatasetError: there are no images that can be read.
    """
    source = source_of(path)
    found = None if source == path else str(Path(path).expanduser().absolute())
    dataset = DatasetConfig(source=source, path=found, resize=resize)
    try:
        raw = load_raw(dataset.source, dataset.path, resize=resize, copies=2)
        if resize is not None or max(raw.size) <= LARGEST_SIDE:
            return dataset, raw
    except DatasetError as failure:
        if resize is not None or "dataset.resize" not in failure.remedy:
            raise
    return read_images(path, LARGEST_SIDE)


def suggest(wish: Wish, dataset: DatasetConfig, raw: RawDataset, plan: Callable[[RunConfig], Proposal]) -> Suggestion:
    """Choose a recipe for images that were read, and for the time that there is.

    Args:
        wish: images per class and time.
        dataset: where the images lie, and the size to which they were brought.
        raw: the images.
        plan: plans a recipe on this machine, with measured speeds.

    Raises:
        DatasetError: a class has too few images.
    """
    draft = _Draft(wish, dataset, raw, plan)
    draft.set("name", wish.name, "names the run's folder")
    for rule in (_data, _experts, _matching, _evaluation):
        for key, value, reason in rule(draft):
            draft.set(key, value, reason)
    _fit_into_time(draft)
    config = draft.config()
    return Suggestion(config, draft.reasons, plan(config))


def measured_plans(raw: RawDataset) -> Callable[[RunConfig], Proposal]:
    """Function that plans recipes for these images on this machine; it measures each width of the network once."""
    shape = DataShape((raw.channels, *raw.size), raw.classes, len(raw.train) + len(raw.validation))
    machines: dict[int, Machine] = {}

    def plan(config: RunConfig) -> Proposal:
        config = config.resolved(raw.size)
        found = Proposal(config, shape, plans_of(config, shape, Layout.of(config, 0)), machine_here(config))
        width = config.network.width
        if width not in machines:
            machines[width] = measured(found, quickly=True)
        return replace(found, machine=machines[width])

    return plan


Choices = Iterator[tuple[str, Any, str]]
"""Key, value and reason of each choice."""


@dataclass
class _Draft:
    """A recipe in the making."""

    wish: Wish
    dataset: DatasetConfig
    raw: RawDataset
    plan: Callable[[RunConfig], Proposal]
    values: dict[str, Any] = field(default_factory=dict)
    """Keys such as `experts.batch_size` -> value."""
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Choose a value."""
        self.values[key], self.reasons[key] = value, reason

    def config(self, values: dict[str, Any] | None = None) -> RunConfig:
        """The recipe so far, with other values."""
        return with_settings(RunConfig(dataset=self.dataset), self.values | (values or {}))

    def clock(self, values: dict[str, Any]) -> dict[str, float]:
        """Stage -> seconds on the clock, with other values."""
        return {stage: 3600 * wall for stage, (_, wall) in self.plan(self.config(values)).stages.items()}

    @property
    def images(self) -> int:
        """Number of synthetic images."""
        return self.wish.ipc * self.raw.classes

    @property
    def counts(self) -> list[int]:
        """Number of images of each class that are not for testing."""
        parts = (self.raw.train, self.raw.validation)
        labels = np.concatenate([part.labels for part in parts])
        return [int(count) for count in np.bincount(labels, minlength=self.raw.classes)]

    @property
    def training(self) -> int:
        """Number of images that experts are trained on."""
        share = self.values["dataset.validation"]
        return sum(count - max(1, int(share * count + 0.5)) for count in self.counts)

    @property
    def epoch(self) -> float:
        """Distance of an epoch of the experts: learning rate times steps."""
        rate = float(self.values["experts.learning_rate"])
        return rate * math.ceil(self.training / int(self.values["experts.batch_size"]))


def _data(draft: _Draft) -> Choices:
    dataset = draft.dataset
    yield "dataset.source", dataset.source, f"{sum(draft.counts):,} images to train on, {len(draft.raw.test):,} to test"
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
    leaves = (smallest - ipc) / smallest  # of this class
    if max(1, int(share * smallest + 0.5)) > smallest - ipc:
        share, why = leaves / 2, f"leaves {ipc} training images of class {name!r}, which has {smallest} in all"
    else:
        why = "chooses the set to keep; the test images choose nothing"
    yield "dataset.validation", float(f"{share:.2g}"), why


def _experts(draft: _Draft) -> Choices:
    batch = 2 ** int(math.log2(max(1, draft.training / EPOCH_STEPS)))
    batch = min(max(SMALLEST_BATCH, batch), PUBLISHED_BATCH)
    steps, published = math.ceil(draft.training / batch), batch == PUBLISHED_BATCH
    yield "experts.batch_size", batch, f"an epoch of {draft.training:,} images then has {steps:,} steps"
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
        yield f"{section}.augmentation", "", f"none, which gave better sets than any on images of {side} pixels or less"
    yield "evaluate.augmentation", "crop_scale_rotate", f"at {side} pixels cutout and flip would make other pictures"


def _matching(draft: _Draft) -> Choices:
    ipc, epoch, share = draft.wish.ipc, draft.epoch, draft.images / draft.training
    yield "distill.ipc", ipc, "as asked for"
    distance = BOUND * ipc**BOUND_POWER
    bound = max(2, round(distance / epoch))
    first = int(bound * min(MOST_LATE, LATE_SHARE * share))
    late = f"; from later on for {share:.0%} of the data" if first else ""
    why = f"to {distance:.0f} by learning rate x steps, as known for {ipc:,} images per class{late}"
    yield "distill.start_epochs", [first, bound], why
    batch = min(draft.images, max(STUDENT_BATCH, 2 * draft.raw.classes))
    yield "distill.batch_size", batch, "all synthetic images" if batch == draft.images else "of a student step"
    yield "distill.threshold", THRESHOLD, "a little above the loss of no movement, near which a set may start"
    found = "found by trial before the first iteration"
    yield "distill.initial_step_size", None, found
    yield "distill.learning_rate_images", None, found
    yield "distill.learning_rate_labels", 5.0, "as for digits, between the published 2 and 10"
    yield "distill.learning_rate_step_size", 5e-5, "as for digits"


def _evaluation(draft: _Draft) -> Choices:
    yield "evaluate.seeds", SEEDS, "networks a row, for a mean and its deviation"


def _lengths(draft: _Draft, steps: int) -> dict[str, Any]:
    """Epochs from start to target for so many student steps, and epochs of the whole training."""
    span = max(1, round(STEP_DISTANCE * steps / draft.epoch))
    epochs = max(draft.values["distill.start_epochs"][1] - 1 + span, math.ceil(TRAINED / draft.epoch))
    return {
        "distill.student_steps": steps,
        "distill.expert_epochs": span,
        "experts.epochs": epochs,
        "experts.keep_epochs": epochs,
    }


def _fit_into_time(draft: _Draft) -> None:
    """Choose the network's width, and the numbers of experts, epochs, student steps and iterations."""
    time = MARGIN * draft.wish.seconds
    for width in WIDTHS:
        values = _fitted(draft, {"network.width": width}, time)
        if values["experts.count"] >= ENOUGH_EXPERTS and values["distill.iterations"] >= ENOUGH_ITERATIONS:
            break
    reasons = _reasons(draft, values)
    for key, value in values.items():
        draft.set(key, value, reasons[key])


def _fitted(draft: _Draft, values: dict[str, Any], time: float) -> dict[str, Any]:
    """Values that take about `time` seconds, or more where the least values do."""
    values |= _lengths(draft, STEPS[-1])
    workers = draft.plan(draft.config(values)).machine.workers
    values["cluster.shards"] = min(workers, draft.raw.classes)
    evaluation = 0.0
    for protocol in PROTOCOLS:
        values |= {"evaluate.protocol": protocol, "evaluate.full": False}
        evaluation = draft.clock(values)["evaluation"]
        if evaluation <= EVALUATION_SHARE * time:
            break
    real_epochs = values["experts.epochs"]
    with_real = draft.clock(values | {"evaluate.full": True, "evaluate.real_epochs": real_epochs})["evaluation"]
    if with_real - evaluation <= REAL_SHARE * time:
        values |= {"evaluate.full": True, "evaluate.real_epochs": real_epochs}
    for steps in STEPS:
        values |= _lengths(draft, steps)
        one, two = (draft.clock(values | {"experts.count": workers * rounds})["experts"] for rounds in (1, 2))
        count = workers * (1 + int((EXPERTS_SHARE * time - one) / (two - one)))
        values["experts.count"] = min(max(2, count), MOST_EXPERTS)
        short = draft.plan(draft.config(values | {"distill.iterations": VALIDATIONS, "distill.validate_every": 1}))
        left = time - sum(3600 * wall for _, wall in short.stages.values())
        iterations = VALIDATIONS + int(left / sum(short.iteration))
        values["distill.iterations"] = min(max(LEAST_ITERATIONS, iterations), MOST_ITERATIONS)
        if iterations >= ENOUGH_ITERATIONS:
            break
    values["distill.validate_every"] = -(-values["distill.iterations"] // VALIDATIONS)
    values["distill.checkpoint_every"] = -(-values["distill.iterations"] // CHECKPOINTS)
    return values


def _words(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _reasons(draft: _Draft, values: dict[str, Any]) -> dict[str, str]:
    """Reasons of the values of `_fitted`."""
    asked, width = _words(draft.wish.seconds), values["network.width"]
    span, steps = values["distill.expert_epochs"], values["distill.student_steps"]
    wider = f"a wider network leaves too few experts or iterations in {asked}"
    reached = draft.epoch * values["experts.epochs"]
    return {
        "network.width": "as published" if width == WIDTHS[0] else wider,
        "cluster.shards": "all workers of this machine distil the set together",
        "evaluate.protocol": f"the longest that takes at most a fifth of {asked}",
        "evaluate.full": "networks on all real images, if they take at most a tenth of the time",
        "evaluate.real_epochs": "as many as the experts have",
        "distill.student_steps": f"as many as leave {ENOUGH_ITERATIONS} iterations in {asked}",
        "distill.expert_epochs": f"{span * draft.epoch:.2g} by learning rate x steps, for {steps} student steps",
        "experts.epochs": f"{reached:.0f} by learning rate x steps: past the latest target, and trained well enough",
        "experts.keep_epochs": "all epochs, so that recipes with more images per class can share the experts",
        "experts.count": f"as many as a third of {asked} allows, at most {MOST_EXPERTS}",
        "distill.iterations": "what is left of the time",
        "distill.validate_every": f"{VALIDATIONS} times, to choose the set to keep",
        "distill.checkpoint_every": f"{CHECKPOINTS} times",
    }
