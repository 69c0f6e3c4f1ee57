"""Recipe for a user's own images: every value is computed from the data, the images per class, and the user's time.

`suggest` applies the rules of a method (draft.py, rules_matching.py, rules_others.py); docs/your-images.md lists them
with their sources. `datm-ray init` writes the recipe with a reason beside every value. Tests:
tests/planning/test_suggest.py.

The rules compare data sets by the distance that plain SGD can go: learning rate times steps. For CIFAR-10 in DATM's
recipes (49,000 images in batches of 256), an epoch has distance 1.92; for 900 images in batches of 32, with twice the
learning rate, 0.58. Measured in distances, the ranges of start epochs in the published recipes and in the recipes for
digits nearly agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from datm_ray.config import DatasetConfig, RunConfig
from datm_ray.config.files import plain_name, to_yaml_with_reasons
from datm_ray.data.reading.decode import image_suffixes
from datm_ray.data.reading.parquet import parts_of
from datm_ray.data.sources import RawDataset, load_raw, require_disk
from datm_ray.data.splits import role_of
from datm_ray.errors import ConfigError, DatasetError
from datm_ray.planning.duration import Proposal
from datm_ray.planning.init import rules_matching, rules_others
from datm_ray.planning.init.draft import AS_ASKED, Choices, Draft, Fitted, Planner, Wish, data
from datm_ray.planning.machines import Machine, machine_here
from datm_ray.planning.measure import measured
from datm_ray.shape import DataShape
from datm_ray.stages.methods.memory import plans_of
from datm_ray.words import counted, data_size, duration

LIGHTER = ("sre2l", "mtt", "datm", "dm", "select")
"""Methods, from the one that takes the most time to the one that takes the least."""
FEW_SCORED = 100
"""Number of test or validation images below which a recipe is written with a warning.

For n images and an accuracy of one half, twice the standard error is 1 / sqrt(n): 10 points for 100 images."""
LARGEST_SIDE = 64
"""Largest side in pixels of images that keep their size if the user gives none; larger ones are resized to it.

The rules follow published recipes, which are for images of at most this size."""


@dataclass(frozen=True)
class Suggestion:
    """Recipe with a reason for every chosen value."""

    config: RunConfig
    reasons: dict[str, str]
    """Key of the recipe, such as `experts.batch_size` -> reason for its value."""
    plan: Proposal
    """Estimated memory, time and storage that the recipe takes on this machine."""
    wish: Wish
    notes: tuple[str, ...] = ()
    """Lines on how the images were read: the use of files and folders, left-out files, and changes of pixels."""

    @property
    def warnings(self) -> list[str]:
        """Warnings in sentences: of too few images to score, and of more time or disk space than the user wished."""
        found, stored, clock = list(self._few_scored()), sum(self.plan.storage.values()), self.plan.clock
        if sum(clock.values()) > self.wish.seconds:
            longest = max(clock, key=lambda stage: clock[stage])
            found.append(
                f"This takes longer than the {duration(self.wish.seconds)} that you asked for, its {longest} alone "
                f"{duration(clock[longest])}. {self.config.method} has no shorter recipe for these images. Try: "
                f"{self._lighter(longest)}, fewer classes, a smaller --resize or a smaller --ipc."
            )
        if stored > self.wish.disk:
            found.append(
                f"This stores {data_size(stored)}, and the disk of the folder runs has "
                f"{data_size(int(self.wish.disk))} left. Try: run it with --out on another disk."
            )
        return found

    def _lighter(self, longest: str) -> str:
        """Options that shorten the stage `longest`, as text: fewer scored networks, or methods that take less time."""
        lighter = LIGHTER[LIGHTER.index(self.config.method) + 1 :]
        if longest == "evaluation" or not lighter:
            return "run it with --set evaluate.seeds=1, which scores one network a row"
        return f"--method {' or '.join(lighter)}"

    def _few_scored(self) -> Iterator[str]:
        """Yield a sentence if there are too few test or validation images for accuracies to mean much."""
        shape = self.plan.shape
        numbers = {"test": shape.test_images, "validation": shape.training_images - shape.trained(self.config.dataset)}
        few = {name: count for name, count in numbers.items() if 0 < count < FEW_SCORED}
        if few:
            listed = " and ".join(f"{counted(count, f'{name} image')}" for name, count in few.items())
            yield (
                f"Accuracies on {listed} say little: by chance alone they may be off by "
                f"{100 / math.sqrt(min(few.values())):.0f} points. Try: add images."
            )

    def __str__(self) -> str:
        """Recipe as YAML, with the reasons as comments."""
        head = f"# Planned for this machine when it was written: {self.plan.lines()[0]}\n"
        if any("distance" in reason for reason in self.reasons.values()):
            head += "# A distance is learning rate x steps: how far plain SGD can go.\n"
        return head + to_yaml_with_reasons(self.config, self.reasons)


Rule = Callable[[Draft], Choices]
Fit = Callable[[Draft], Fitted]
RULES: dict[str, tuple[Sequence[Rule], Fit]] = {
    "datm": ((data, rules_matching.experts, rules_matching.matching), rules_matching.fitted),
    "mtt": ((data, rules_matching.experts, rules_matching.matching), rules_matching.fitted),
    "dm": ((data, rules_others.embeddings), rules_others.fitted_embeddings),
    "select": ((data, rules_others.teacher, rules_others.selection), rules_others.fitted_selection),
    "sre2l": (
        (rules_others.statistics, data, rules_others.teacher, rules_others.recovery),
        rules_others.fitted_recovery,
    ),
}
"""Method -> (its rules in the order of their use, its last rule, which fills the time that the user gives)."""


def default_name(path: str, ipc: int, method: str = "datm") -> str:
    """Default name of a run, from the path of its images, the method unless it is datm, and the images per class.

    Of two paths, as in "TRAIN.parquet,TEST.parquet", the first gives the name.
    """
    kind = "" if method == "datm" else f"-{method}"
    return plain_name(f"{parts_of(path)[0].absolute().stem}{kind}-ipc{ipc}")


def source_of(path: str) -> str:
    """Choose the `dataset.source` for the files at a path.

    Returns "folder", "parquet", or the name of a known data set, such as "cifar10", if the path has its official files.
    If `path` itself is such a name, it is returned, unless a file or folder has that name.
    """
    place = Path(path).expanduser()
    if not place.exists() and path in ("digits", "cifar10", "cifar100", "tiny-imagenet"):
        return path
    if place.suffix.lower() == ".parquet" or _is_of_tables(place):
        return "parquet"
    names = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100", "wnids.txt": "tiny-imagenet"}
    return next((source for name, source in names.items() if place.name == name or _has(place / name)), "folder")


def _is_of_tables(folder: Path) -> bool:
    """True if a folder has Parquet files and no class folders of images. False if it cannot be read.

    Images beside the Parquet files, such as a repository's banner, do not count as a class. If a Parquet file is named
    as training data, a single folder of images, such as `assets`, does not either.
    """
    tables = [file for file in _files(folder, {".parquet"}) if not file.is_dir()]
    if not tables:
        return False
    classes = {image.parent for image in _files(folder, image_suffixes())} - {folder}
    named = any(role_of(*reversed(file.relative_to(folder).parts)) == "train" for file in tables)
    return not classes or (named and len(classes) == 1)


def _files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yield the files with one of the suffixes, up to three folders deep, hidden ones left out.

    In a cache of the Hugging Face hub, tables are three folders deep: snapshots/REVISION/data/x.parquet. The rest of a
    folder is left out once a part of it cannot be read.
    """
    with suppress(OSError):
        for file in (file for deep in ("*", "*/*", "*/*/*", "*/*/*/*") for file in folder.glob(deep)):
            if file.suffix.lower() not in suffixes:
                continue
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                yield file


def _has(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def read_images(path: str, resize: int | None) -> tuple[DatasetConfig, RawDataset]:
    """Read the images at a path. Returns the section `dataset` of a recipe that reads them, and the images.

    Args:
        path: file, folder, or name of a known data set; two Parquet files are separated by a comma.
        resize: side in pixels to which all images are resized. `None` keeps the size of images that all have one
            size of at most 64 pixels, and resizes others to 64x64.

    Raises:
        DatasetError: the path has no images that can be read.
    """
    require_disk(path)
    source = source_of(path)
    parts = parts_of(path) if source == "parquet" else [Path(path).expanduser()]
    found = None if source == path else ",".join(str(part.absolute()) for part in parts)
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


def suggest(wish: Wish, dataset: DatasetConfig, raw: RawDataset, plan: Planner) -> Suggestion:
    """Choose a recipe for the user's images and time.

    Args:
        wish: name, images per class, time, method and free disk.
        dataset: source, path and size of the images.
        raw: the images.
        plan: plans a recipe on this machine.

    Raises:
        ConfigError: there are no rules for the method, it needs a larger set, or the set does not fit into memory.
        DatasetError: a class has too few images.
    """
    rules, fit = rules_of(wish.method)
    draft = Draft(wish, dataset, raw, plan)
    draft.set("name", wish.name, "names the run's folder")
    if wish.method != "datm":
        draft.set("method", wish.method, AS_ASKED)
    for rule in rules:
        for key, value, reason in rule(draft):
            draft.set(key, value, reason)
    values, reasons = fit(draft)
    for key, value in values.items():
        draft.set(key, value, reasons[key])
    config = draft.config()
    return Suggestion(config, draft.reasons, draft.plan(config), wish, raw.notes)


def rules_of(method: str) -> tuple[Sequence[Rule], Fit]:
    """Rules that choose a recipe of a method, in the order of their use, and the last one, which fills the user's time.

    Raises:
        ConfigError: there are no rules for this method.
    """
    if method not in RULES:
        raise ConfigError(
            f"no rules choose a recipe for method {method!r}",
            remedy=f"choose one of {', '.join(RULES)}; other recipes are written by hand",
        )
    return RULES[method]


def measured_plans(raw: RawDataset, say: Callable[[str], None]) -> Planner:
    """Make a `Planner`, a function that plans recipes for these images with measured speeds of this machine.

    The planner takes a recipe and `exactly`. On a GPU, or if `exactly` is True, it measures the speed by the compiled
    steps of a run; otherwise by small uncompiled steps. Both speeds are measured at most once for each width of the
    network. The planner raises a `ConfigError` if workers lack memory.

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
