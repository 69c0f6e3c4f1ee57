"""MetaDD in a distillation: its networks, its images in an iteration, and class activation maps written at the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import MetaConfig, short_names
from datm_ray.core.metadd import IMAGES_AT_A_TIME, MetaDD, meta_feature_ratio, scaled_maps
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.state import MetaTerm
from datm_ray.runtime.executor import Phase
from datm_ray.runtime.heartbeats import reporting
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import REPORT_INTERVAL
from datm_ray.stages.methods.memory import chunk_by_trial, meta_plan_of_part
from datm_ray.stages.methods.part import Part
from datm_ray.store.files.filesystem import Location
from datm_ray.store.tensors import write_tensors

MAPPING = "computing class activation maps"
MAPS_KIND = "class activation maps"
MAPS_KEPT = 10
"""Largest number of images whose class activation maps are written: the first image of each of the first classes."""


class MetaNetworks:
    """MetaDD networks that one worker holds, each with the parameters of an expert after its last epoch.

    An ensemble is one network of each architecture. There are `metadd.experts.count` ensembles, which iterations use in
    turn. Ensemble i has expert i of each architecture, or expert i % n of an architecture with n experts.

    Attributes:
        chunk: largest number of images that pass through the networks at a time in an iteration. On GPUs, also for the
            maps written at the end of a distillation. All workers of a set must have the same number.
    """

    def __init__(self, part: Part, settings: MetaConfig, backbone: ExpertNetworks) -> None:
        """Load the MetaDD networks that this worker computes: the run's first backbone, auxiliaries, or both.

        Args:
            part: the worker's part in the distillation. If the worker makes a piece (some images of some classes), the
                images that MetaDD uses are drawn from this piece.
            settings: section `metadd` of the recipe.
            backbone: experts of the first backbone, opened already. Auxiliaries are read from the store here.

        Raises:
            MissingExpertsError: the store lacks experts of an auxiliary (another architecture of MetaDD).
        """
        self._part, self._config, self._settings, self._rows = part, part.config, settings, part.rows
        self._classes, self._piece = part.dataset.classes, part.piece
        self.chunk = IMAGES_AT_A_TIME
        auxiliaries = part.config.each_auxiliary()
        experts = {
            place: ExpertNetworks(auxiliaries[place - 1], part.dataset, part.store_uri, part.device)
            if place
            else backbone
            for place in part.role.meta_networks
        }
        self._ensembles = [
            MetaDD({place: each.restored(turn % each.count) for place, each in experts.items()}, settings)
            for turn in range(settings.experts.count)
        ]

    @property
    def _images(self) -> int:
        """Number of images of the whole synthetic set."""
        return self._config.distill.ipc * self._classes

    def term(self, iteration: int) -> MetaTerm:
        """MetaDD's loss term for an iteration: the networks, and the images for which the term is computed.

        The images are drawn from the whole set or, if the set is made in pieces, from this worker's piece. The term
        contains only the drawn images that this worker holds.
        """
        images = self._images if self._piece is None else self._rows.last
        count = max(1, round(self._settings.share * images))
        drawn = np.arange(images)
        if count < images:
            drawn = np.sort(self._draws(iteration).choice(images, count, replace=False))
        held = drawn[(drawn >= self._rows.first) & (drawn < self._rows.last)] - self._rows.first
        metadd = self._ensembles[iteration % len(self._ensembles)]
        return MetaTerm(metadd, self._config.meta_network_count, held, count, chunk=self.chunk)

    def images_that_fit(self) -> int:
        """Largest number of images to pass through this worker's MetaDD networks at a time; 0 if it has none.

        Memory limits the number. On a CPU the number is also kept so small that computing is fast. On a GPU, trials
        find how many images fit.
        """
        part, plan = self._part, meta_plan_of_part(self._part)
        if part.device.type != "cuda" or not plan.chunk:
            return plan.chunk

        def step(count: int) -> None:
            images = torch.zeros(count, *part.dataset.image_shape, device=part.device)
            labels = torch.zeros(count, dtype=torch.long, device=part.device)
            networks = self._config.meta_network_count
            self._ensembles[0].gradient(images, labels, networks=networks, classes=self._classes, chunk=count)

        return chunk_by_trial(step, plan, part.device)

    def _draws(self, iteration: int) -> np.random.Generator:
        """Random generator that draws the images for MetaDD in an iteration. Each piece of a set has other draws."""
        if self._piece is None:
            return generator(self._config.seed, Purpose.META_IMAGES, iteration)
        return generator(self._config.seed, Purpose.RECOVERY_META, self._piece.number, iteration)

    def _maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """Class activation maps [m b h w] of images [b c h w] for their labels [b], scaled to [0, 1], on the device.

        m counts the networks of ensemble 0, one for each architecture, on all workers, which call this together. The
        images may be in main memory.
        """
        seen = self._ensembles[0].evidence(
            images.to(self._part.device),
            labels.to(self._part.device),
            networks=self._config.meta_network_count,
            classes=self._classes,
            chunk=self._viewed_at_a_time,
            all_sum=self._part.mesh.sum_over_backbones,
        )
        return scaled_maps(seen.maps)

    @property
    def _viewed_at_a_time(self) -> int:
        """Number of images that pass the networks at a time when maps are computed outside of an iteration.

        On a GPU the number is `chunk`. On a CPU it is `IMAGES_AT_A_TIME`, as in earlier versions of this package,
        because results with another number would be rounded differently.
        """
        return self.chunk if self._part.device.type == "cuda" else IMAGES_AT_A_TIME

    def _ratio(self, images: Tensor, labels: Tensor) -> Steps[Tensor]:
        """Sum [] of the meta-feature ratios of images [n c h w] with labels [n], see `keep_maps`.

        The images are computed in batches. Yields after each batch.
        """
        size = self._viewed_at_a_time
        ratios = list[Tensor]()
        for part in zip(images.split(size), labels.split(size), strict=True):
            ratios.append(meta_feature_ratio(self._maps(*part), self._settings.threshold).sum())
            yield
        return torch.stack(ratios).sum()

    def keep_maps(self, place: Location, initial: Tensor, final: SyntheticSet) -> Iterator[Phase]:
        """Write class activation maps of some images, and the mean meta-feature ratio of all images.

        A pixel is a feature of a network if the network's map is at least `metadd.threshold` there. An image's ratio is
        the number of pixels that are a feature of all networks, divided by the number that are a feature of any. Maps
        and ratio are written for the images before and after the distillation. Yields phases as a heartbeat.

        Args:
            place: file to write.
            initial: [n c h w] the images of this worker before the first iteration.
            final: this worker's images and labels of the final set, which validation may have chosen from an earlier
                iteration. If `initial` and `final` are in main memory, a batch at a time is copied to the device.
        """
        mesh, labels, ratios = self._part.mesh, final.labels, []
        arrays: dict[str, NDArray[np.generic]] = {}
        shown = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:MAPS_KEPT]])
        for name, images in (("initial", initial), ("final", final.images)):
            ratio = yield from reporting(self._ratio(images, labels), MAPPING, REPORT_INTERVAL)
            ratios.append(float(mesh.sum_over_classes(ratio)) / self._images)
            maps = mesh.gather(self._maps(images[shown], labels[shown]).transpose(0, 1))
            if maps is not None:
                arrays[name] = maps[:MAPS_KEPT].transpose(0, 1).cpu().numpy()
        rows = mesh.gather(shown + self._rows.first)
        if mesh.is_first and rows is not None:
            arrays["rows"] = rows[:MAPS_KEPT].cpu().numpy()
            names = short_names([each.network for each in (self._config, *self._config.each_auxiliary())])
            metadata = {"networks": names, "ratios": ratios, "threshold": self._settings.threshold}
            write_tensors(place, arrays, kind=MAPS_KIND, metadata=metadata)


def keep_maps_alone(
    part: Part, settings: MetaConfig, backbone: ExpertNetworks, place: Location, initial: Tensor, final: SyntheticSet
) -> Iterator[Phase]:
    """Write class activation maps and the mean meta-feature ratio of a whole set on one worker.

    Does for the whole set what `MetaNetworks.keep_maps` does. Yields phases as a heartbeat.

    Args:
        part: part of this worker, which holds the whole set.
        settings: section `metadd` of the recipe.
        backbone: experts of the first backbone.
        place: file to write.
        initial: [n c h w] images of the set before the first iteration.
        final: the final set.

    Raises:
        MissingExpertsError: the store lacks experts of an auxiliary (another architecture of MetaDD).
    """
    networks = MetaNetworks(part, settings, backbone)
    networks.chunk = networks.images_that_fit()
    yield from networks.keep_maps(place, initial, final)
