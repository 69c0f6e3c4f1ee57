"""Draft of a recipe for `datm-ray init`: the user's wish, values chosen so far with reasons, and rules of all methods.

Tests: tests/planning/test_suggest.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datm_ray.config import PUBLISHED_AUGMENTATION, DatasetConfig, RunConfig, with_settings
from datm_ray.data.sources import RawDataset
from datm_ray.data.splits import held_out
from datm_ray.errors import ConfigError, DatasetError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import machine_here
from datm_ray.words import duration

EPOCH_STEPS = 25
"""Smallest number of SGD steps in an expert's epoch, unless batches would have fewer than `SMALLEST_BATCH` images."""
SMALLEST_BATCH, PUBLISHED_BATCH = 16, 256
"""Smallest and largest batch size of experts, inclusive. The largest is the one published for DATM's experts."""
PUBLISHED_RATE, RATE = 0.01, 0.02
"""Experts' learning rates: the published one, for batches of `PUBLISHED_BATCH` images, and that of the recipe
digits-ipc10, for smaller batches."""
TRAINED = 35.0
"""Smallest distance (learning rate times number of steps) that the experts of a suggested recipe are trained for.

Experts also label the first images, which may need more training than the matched epochs. The experts of the recipe
digits-ipc10 have distance 31: learning rate 0.02, 40 epochs of 39 steps."""
VALIDATION, MOST_VALIDATION = 0.1, 5000
"""Share of the training images that is held out for validation, and largest number of these images."""
WIDTHS = (128, 64, 32, 16)
"""Widths of the network (channels of its layers), in the order of trying them."""
MOST_ITERATIONS, LEAST_ITERATIONS = 10_000, 20
"""Largest number of suggested iterations, as published for DATM, and smallest, even if it takes too long."""
EXPERTS_SHARE, EVALUATION_SHARE, REAL_SHARE = 0.35, 0.2, 0.1
"""Largest shares of the planned time: for experts, for evaluation, and in addition for the evaluation's networks on all
real images. Distillation gets the rest."""
PLANNED_SHARE = 0.7
"""Share of the user's time that a plan fills. The rest is a reserve: runs took 1.1 to 1.6 times as long as planned."""
EXACT_FROM = 900.0
"""Seconds that a user must give a run, at least, so that compiled steps are timed for its plan.

Compiling and timing take about a minute, and the run reuses the compiled steps. For a shorter run, uncompiled steps are
timed within seconds."""
SMALLEST_PICTURE = 24
"""Smallest side in pixels, inclusive, of images that get the published augmentation; smaller ones get less or none."""
EVALUATIONS = (("published", 5), ("short", 5), ("brief", 5), ("brief", 3))
"""Pairs (evaluation protocol, number of networks in each row of the accuracy table), in the order of trying them."""
VALIDATIONS, CHECKPOINTS = 5, 20
"""Numbers of validations and of checkpoints in a distillation, at most, from which `saved` computes their intervals."""
TOO_LARGE = "ask for fewer images per class, smaller ones (--resize) or fewer classes, or free memory"
"""Advice in error messages, with options of `init`, for a set that fits into memory with no recipe."""
AS_ASKED, FOUND = "as asked for", "found by trial before the first iteration"


@dataclass(frozen=True)
class Wish:
    """A user's request for a recipe."""

    name: str
    """Name of the run."""
    ipc: int
    """Synthetic images per class."""
    seconds: float
    """Seconds on the clock that the whole run may take, from the first expert to the report."""
    method: str = "datm"
    """Method of the recipe, a key of `RULES` in suggest.py."""
    disk: float = math.inf
    """Free bytes of the disk that will hold the run; infinite if it is unknown."""


Planner = Callable[[RunConfig, bool], Proposal]
"""Type of a function that plans a recipe on this machine, with measured speeds. Arguments: the recipe; True to time
compiled steps. Raises a `ConfigError` if workers lack memory."""
Choices = Iterator[tuple[str, Any, str]]
"""Type of a rule's result: an iterator over (key of the recipe, value, reason)."""
Fitted = tuple[dict[str, Any], dict[str, str]]
"""Type of the result of a rule that fills the time: key -> value, and key -> reason."""


@dataclass
class Draft:
    """Unfinished recipe: the values chosen so far, with their reasons."""

    wish: Wish
    dataset: DatasetConfig
    raw: RawDataset
    planner: Planner
    exactly: bool = False
    """True to plan with times of the run's own compiled steps; False: on CPUs, of small uncompiled steps."""
    values: dict[str, Any] = field(default_factory=dict)
    """Key of the recipe, such as `experts.batch_size` -> value chosen for it."""
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Set a key of the recipe, such as `experts.batch_size`, to a value, and keep the reason for it."""
        self.values[key], self.reasons[key] = value, reason

    def config(self, values: dict[str, Any] | None = None) -> RunConfig:
        """Make a recipe from the values chosen so far and from `values`, which replace chosen values of equal keys.

        Raises:
            ConfigError: a key is unknown, or values contradict each other.
        """
        return with_settings(RunConfig(dataset=self.dataset), self.values | (values or {}))

    def plan(self, config: RunConfig) -> Proposal:
        """Estimate the memory, time and storage that a recipe takes on this machine.

        Raises:
            ConfigError: workers lack memory.
        """
        return self.planner(config, self.exactly)

    def clock(self, values: dict[str, Any]) -> dict[str, float]:
        """Stage -> estimated seconds on the clock, for the recipe that `config` makes from these values.

        Raises:
            ConfigError: workers lack memory.
        """
        return self.plan(self.config(values)).clock

    def stored(self, values: dict[str, Any]) -> int:
        """Estimated bytes of experts, scoring networks and transforms of the recipe that `config` makes from `values`.

        Raises:
            ConfigError: workers lack memory.
        """
        return self.plan(self.config(values)).storage["store"]

    def fits(self, values: dict[str, Any]) -> bool:
        """True if workers have enough memory for the recipe that `config` makes from these values.

        The values must have `cluster.shards`.
        """
        return bool(self._fitting(values, [values["cluster.shards"]]))

    def _fitting(self, values: dict[str, Any], shards: Iterable[int]) -> dict[int, Proposal]:
        """Number of shards -> plan, for those of the given numbers for which workers have enough memory."""
        found = {}
        for number in dict.fromkeys(shards):
            with suppress(ConfigError):
                found[number] = self.plan(self.config(values | {"cluster.shards": number}))
        return found

    def layout(self, values: dict[str, Any]) -> tuple[int, int]:
        """Number of workers on this machine, and the number of shards with which an iteration takes the least time.

        A shard is the classes of one worker. Two numbers of shards are compared: 1, and the number of workers, but not
        more than there are classes. A number is left out if workers lack memory for its shards.

        Args:
            values: values of the recipe, which replace chosen values of equal keys.

        Raises:
            ConfigError: no worker has enough memory.
        """
        here = min(machine_here(self.config(values)).workers, self.raw.classes)  # a shard has at least one class
        found = self._fitting(values, (1, here))
        if not found:
            self.plan(self.config(values | {"cluster.shards": here}))  # raises the error
        workers = next(iter(found.values())).machine.workers
        if (many := min(workers, self.raw.classes)) != here:
            found = self._fitting(values, (1, many))
        return workers, min(found, key=lambda shards: (sum(found[shards].iteration), shards))

    @property
    def planned_seconds(self) -> float:
        """Seconds that a plan may take: the time that the user gives the run, without a reserve."""
        return PLANNED_SHARE * self.wish.seconds

    @property
    def asked(self) -> str:
        """Time that the user gives the run, as text, such as "30 min"."""
        return duration(self.wish.seconds)

    @property
    def too_short(self) -> str:
        """Reason, as text, for choosing the smallest allowed number: the user's time is too short for more."""
        return f"the least; {self.asked} would be too short for more"

    @property
    def images(self) -> int:
        """Number of images of the whole synthetic set."""
        return self.wish.ipc * self.raw.classes

    @property
    def side(self) -> int:
        """Height or width of the images in pixels, whichever is smaller."""
        return min(self.raw.size)

    @property
    def counts(self) -> list[int]:
        """Number of real images of each class for training and validation together."""
        parts = (self.raw.train, self.raw.validation)
        labels = np.concatenate([part.labels for part in parts])
        return [int(count) for count in np.bincount(labels, minlength=self.raw.classes)]

    @property
    def training_counts(self) -> list[int]:
        """Number of real images of each class that networks are trained on, without validation images."""
        share = self.values["dataset.validation"]
        return [count - held_out(count, share) for count in self.counts]

    @property
    def training_images(self) -> int:
        """Number of real images that experts are trained on, without validation images."""
        return sum(self.training_counts)

    @property
    def batch_size(self) -> int:
        """Number of images in an SGD step of an expert.

        This is the largest power of two with which an epoch has at least `EPOCH_STEPS` steps, but not less than
        `SMALLEST_BATCH` and not more than `PUBLISHED_BATCH`.
        """
        batch: int = 2 ** int(math.log2(max(1, self.training_images / EPOCH_STEPS)))
        return min(max(SMALLEST_BATCH, batch), PUBLISHED_BATCH)

    @property
    def learning_rate(self) -> float:
        """Experts' learning rate, for plain SGD on batches of `batch_size`."""
        return PUBLISHED_RATE if self.batch_size == PUBLISHED_BATCH else RATE

    @property
    def epoch_distance(self) -> float:
        """Measure of how far an expert's weights move in one epoch: learning rate times number of SGD steps."""
        return self.learning_rate * math.ceil(self.training_images / self.batch_size)

    def augmentation(self, *sections: str) -> Choices:
        """Choose the augmentation of `sections` of the recipe, such as "experts" and "distill"."""
        if self.side >= SMALLEST_PICTURE:
            is_grey = self.raw.channels == 1
            every = PUBLISHED_AUGMENTATION.removeprefix("color_") if is_grey else PUBLISHED_AUGMENTATION
            why = "as published" + (" but for colour, which grey images lack" if is_grey else "")
            yield from ((f"{section}.augmentation", every, why) for section in sections)
            return
        for section in sections:
            if section == "evaluate":
                why = f"at {self.side} pixels cutout and flip would make other pictures"
                yield "evaluate.augmentation", "crop_scale_rotate", why
            else:
                yield f"{section}.augmentation", "", "none, as for the digits, where none gave better sets"

    def evaluation(self, values: dict[str, Any], real_epochs: int) -> dict[str, Any]:
        """Values of section `evaluate` for the longest evaluation within `EVALUATION_SHARE` of the planned time.

        If every evaluation takes longer, the shortest is chosen.
        Networks on all real images are added if they take at most `REAL_SHARE` of the planned time.

        Args:
            values: values of the recipe, which replace chosen values of equal keys.
            real_epochs: number of epochs for which networks are trained on all real images.

        Raises:
            ConfigError: workers lack memory.
        """
        for protocol, seeds in EVALUATIONS:
            found = {"evaluate.protocol": protocol, "evaluate.seeds": seeds, "evaluate.full": False}
            seconds = self.clock(values | found)["evaluation"]
            if seconds <= EVALUATION_SHARE * self.planned_seconds:
                break
        real = {"evaluate.full": True, "evaluate.real_epochs": real_epochs}
        if self.clock(values | found | real)["evaluation"] - seconds <= REAL_SHARE * self.planned_seconds:
            found |= real
        return found

    def reasons_for(
        self,
        values: dict[str, Any],
        enough: str,
        real_epochs: str,
        least: int = LEAST_ITERATIONS,
        most: int = MOST_ITERATIONS,
    ) -> dict[str, str]:
        """Key of the recipe -> reason for its value, for keys that several methods share, such as `network.width`.

        Args:
            values: the chosen values.
            enough: what the time would not suffice for with a wider network, such as "300 iterations".
            real_epochs: reason for the number of epochs on all real images.
            least: smallest number of iterations that the rules choose.
            most: largest number of iterations that the rules choose, which is the published one.
        """
        iterations, is_widest = values.get("distill.iterations", 0), values["network.width"] == WIDTHS[0]
        return {
            "network.width": "channels, as published"
            if is_widest
            else f"channels; more would leave fewer than {enough} in {self.asked}",
            "cluster.shards": "all workers of this machine distil the set together"
            if values.get("cluster.shards", 1) > 1
            else "sums over workers would take longer than they save, or there is one worker",
            "evaluate.protocol": f"the longest that takes at most a fifth of {self.asked}, or the shortest that trains "
            "networks",
            "evaluate.seeds": "networks of a row, for a mean and its deviation",
            "evaluate.full": "networks on all real images take at most a tenth of the time"
            if values["evaluate.full"]
            else "left out: networks on all real images take more than a tenth of the time",
            "evaluate.real_epochs": real_epochs,
            "distill.iterations": "as published"
            if iterations == most
            else "as many as the rest of the time allows"
            if iterations > least
            else self.too_short,
            "distill.validate_every": f"{VALIDATIONS} times, to choose the set to keep",
            "distill.checkpoint_every": f"about {min(CHECKPOINTS, iterations)} times; Ctrl-C saves too",
        }

    def widest(self, of_width: Callable[[Draft, int], tuple[dict[str, Any], bool]]) -> dict[str, Any]:
        """Recipe values for the largest width of the network for which time and memory are enough.

        If the time is enough for no width, the values are those for the smallest.

        Args:
            of_width: function that returns the values for a width, and True if the time is enough. Raises a
                `ConfigError` if memory is not.

        Raises:
            ConfigError: memory is not enough for any width.
        """
        is_long = self.wish.seconds >= EXACT_FROM
        for width in WIDTHS:
            self.exactly = False
            try:
                values, is_enough = of_width(self, width)
            except ConfigError as failure:  # too little memory
                if width == WIDTHS[-1]:
                    raise ConfigError(failure.fact, failure.cause, TOO_LARGE) from failure
                continue
            if is_long and (is_enough or width == WIDTHS[-1]):
                self.exactly = True
                values, is_enough = of_width(self, width)
            if is_enough:
                break
        return values


def data(draft: Draft) -> Choices:
    """Choose the data, their normalisation, and the depth of a convnet.

    Raises:
        DatasetError: a class has too few images.
    """
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
    resolved = draft.config().resolved(draft.raw.size)
    kind = resolved.dataset.normalisation
    why = "whitening, as published up to 64x64 pixels" if kind == "zca" else "whitening takes long above 64x64"
    if draft.wish.method not in ("datm", "mtt"):
        kind, why = "standard", f"mean and deviation of each channel, as published for {draft.wish.method}"
    yield "dataset.normalisation", kind, why
    if resolved.network.architecture == "convnet":
        why = f"blocks; each halves the {draft.side} pixels, and maps keep 3 or more"
        yield "network.depth", resolved.network.depth, why


def saved(iterations: int) -> dict[str, int]:
    """Values of `distill.validate_every` and `distill.checkpoint_every`, in iterations.

    At these intervals a distillation has at most `VALIDATIONS` validations and `CHECKPOINTS` checkpoints. Further
    checkpoints are written before validations, and by time.
    """
    return {
        "distill.validate_every": -(-iterations // VALIDATIONS),
        "distill.checkpoint_every": -(-iterations // CHECKPOINTS),
    }
