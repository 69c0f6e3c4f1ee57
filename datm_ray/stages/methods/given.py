"""A set that another program or another run has made (method given), scored like the sets that are made here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from datm_ray.config import GivenConfig, RunConfig
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.synthetic import SyntheticSet, hard_logits
from datm_ray.data.sources import RawDataset
from datm_ray.data.transform import fitted_elsewhere
from datm_ray.errors import ConfigError, DatmError
from datm_ray.interop.sets import GivenSet, read_set, read_step_size
from datm_ray.stages.methods.base import STEP_SIZE, Demand, Method
from datm_ray.store.files.filesystem import open_location


class Given(Method):
    """Reads the set at `given.path`. There are no iterations, and nothing is trained for the set itself."""

    batch_norm = "either"
    reads_last_epoch = True  # which labels images
    has_iterations = False
    _warning = ""
    has_teacher = True

    @classmethod
    def trained_backbones(cls, config: RunConfig) -> list[RunConfig]:
        """The recipe's `network` if `evaluate` needs it, as teacher or to label random images; else an empty list."""
        evaluate = config.evaluate
        is_teacher = evaluate.has_teacher and evaluate.teacher is None
        return config.each_backbone()[:1] if is_teacher or evaluate.fair else []

    @classmethod
    def has_soft_labels(cls, config: RunConfig) -> bool:
        """True, because the labels are those in the file, which may be soft."""
        return True

    @classmethod
    def has_step_size(cls, config: RunConfig) -> bool:
        """True if the recipe or the set gives a step size, which a resolved run has in `given.step_size`."""
        return section_of(config).step_size is not None

    @classmethod
    def resolved(cls, config: RunConfig, raw: RawDataset | None = None, made: RunConfig | None = None) -> RunConfig:
        """Copy of a run whose section `given` states the set's digest, absolute path and step size.

        The set is read and checked, unless the run was finished with it: `config` and `made` state the same digest, and
        either they state the same step size, or the set's files are gone. A step size that `config` states is kept.
        Otherwise it is that of the set, or of `made` if the set is not read.

        Args:
            config: the run, resolved for its images' size.
            raw: real images of the run; `None` for a plan, which fills in the step size alone, if it can be read.
            made: configuration with which the finished set of the run was made; `None` if there is none.

        Raises:
            DatmError: the set cannot be read, does not fit the run, or has another digest than the recipe states.
        """
        settings, kept = section_of(config), made and made.given
        place = open_location(settings.path)
        stated: dict[str, Any] = {"path": place.uri}
        if raw is None:
            stated = {"step_size": settings.step_size or _readable_step_size(settings.path)}
        elif kept and settings.digest == kept.digest and (settings.step_size == kept.step_size or not place.exists()):
            stated["step_size"] = settings.step_size or kept.step_size
        else:
            found = read_set(settings.path, raw.class_names)
            _require_digest(found, settings)
            found.require_fitting((raw.channels, *raw.size), raw.class_names, config.distill.ipc)
            stated |= {"digest": found.digest, "step_size": settings.step_size or found.step_size}
        return config.model_copy(update={"given": settings.model_copy(update=stated)})

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that the method cannot follow, such as one without the section `given`."""
        super().check(config)
        section_of(config)

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Smallest possible work and memory, because the method has no iterations."""
        return Demand({}, at_once=1, maps=1, vectors=1)

    @classmethod
    def choosing(cls, config: RunConfig, classes: int, training_images: int) -> Mapping[str, float]:
        """Empty mapping: no network sees the set before it is scored."""
        return {}

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: how many images are read."""
        return f"{images:,} images of a finished set, without iterations"

    def first_set(self) -> SyntheticSet:
        """Read this worker's images and labels of the set. Images are normalised as this run's data set is.

        Raises:
            DatmError: the set cannot be read, does not fit the run, or has another digest than the recipe states.
        """
        part, settings = self.part, section_of(self.part.config)
        found = read_set(settings.path, part.dataset.class_names)
        _require_digest(found, settings)
        found.require_fitting(part.dataset.image_shape, part.dataset.class_names, part.config.distill.ipc)
        rows = slice(part.rows.first, part.rows.last)
        mine = replace(found, images=found.images[rows])
        labels = torch.tensor(found.labels[rows], device=part.device)
        if found.soft_labels is None:
            soft_labels = hard_logits(labels, part.dataset.classes)
        else:
            soft_labels = torch.tensor(found.soft_labels[rows], device=part.device)
        transform = part.dataset.transform
        if found.fitted not in ("", transform.fingerprint):
            self._warning = fitted_elsewhere(found.uri, "this run's")
        images = torch.tensor(mine.images_for(transform), device=part.device)
        step_size = settings.step_size or STEP_SIZE
        return SyntheticSet(images, soft_labels, torch.full((1,), step_size, device=part.device), labels)

    def warnings(self, state: Any) -> Iterator[str]:
        """Yields a message if the set's transform was fitted on other images than the run's."""
        yield from filter(None, [self._warning])


def section_of(config: RunConfig) -> GivenConfig:
    """Section `given` of a run.

    Raises:
        ConfigError: the recipe has none.
    """
    if config.given is None:
        raise ConfigError(
            "given.path is missing", "method given scores a finished set", "use --set given.path=FOLDER, or a file"
        )
    return config.given


def _readable_step_size(uri: str) -> float | None:
    """Step size of the set in the files at `uri`; `None` if the files hold none, or cannot be read here."""
    with suppress(DatmError):
        return read_step_size(uri)
    return None


def _require_digest(found: GivenSet, settings: GivenConfig) -> None:
    digest = found.digest if settings.digest else None
    if digest != settings.digest:
        raise ConfigError(
            f"the content of {found.uri} has the digest {digest}, and given.digest is {settings.digest}",
            "the files are of another set, or were changed",
            "restore them, or leave out given.digest and give another --out or --set name=...",
        )
