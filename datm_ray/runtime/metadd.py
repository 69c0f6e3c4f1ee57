"""MetaDD within a distillation: which networks look, at which images, and what is kept of what they see."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import MetaConfig, Role, RunConfig, network_names
from datm_ray.core.distillation import MetaTerm
from datm_ray.core.metadd import IMAGES_AT_A_TIME, MetaDD, MetaOptions, meta_feature_ratio, scaled_maps
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.data.dataset import Dataset
from datm_ray.runtime.checkpoint import Rows
from datm_ray.runtime.expert_networks import ExpertNetworks
from datm_ray.runtime.mesh import Mesh
from datm_ray.store.filesystem import Location
from datm_ray.store.tensors import write_tensors

MAPS_KIND = "class activation maps"
MAPS_SHOWN = 10
"""Images of which maps are kept: the first of each class."""


class Onlookers:
    """The networks of MetaDD that one worker holds: the last snapshots of experts, one set for each turn."""

    def __init__(
        self,
        config: RunConfig,
        settings: MetaConfig,
        dataset: Dataset,
        store_uri: str,
        role: Role,
        backbone: ExpertNetworks,
        rows: Rows,
        device: torch.device,
    ) -> None:
        """Restore them.

        Args:
            backbone: the first one's experts.
            rows: of the synthetic set that the worker holds.

        Raises:
            MissingExpertsError: an auxiliary has none.
        """
        self._config, self._settings, self._rows, self._classes = config, settings, rows, dataset.classes
        options = MetaOptions(
            settings.variance,
            settings.invariance,
            settings.position,
            settings.divergence,
            settings.threshold,
            settings.variance_of,
        )
        auxiliaries = config.each_auxiliary()
        experts = {
            place: ExpertNetworks(auxiliaries[place - 1], dataset, store_uri, device) if place else backbone
            for place in role.seen_by
        }
        self._turns = [
            MetaDD({place: each.restored(turn % each.count) for place, each in experts.items()}, options)
            for turn in range(settings.experts.count)
        ]

    @property
    def _images(self) -> int:
        """Of the whole synthetic set."""
        return self._config.distill.ipc * self._classes

    def term(self, iteration: int) -> MetaTerm:
        """The images looked at in this iteration, those of them that this shard holds."""
        count = max(1, round(self._settings.share * self._images))
        drawn = np.arange(self._images)
        if count < self._images:
            draws = generator(self._config.seed, Purpose.META_IMAGES, iteration)
            drawn = np.sort(draws.choice(self._images, count, replace=False))
        held = drawn[(drawn >= self._rows.first) & (drawn < self._rows.last)] - self._rows.first
        metadd = self._turns[iteration % len(self._turns)]
        return MetaTerm(metadd, self._config.networks_looking, held, count)

    def _maps(self, images: Tensor, labels: Tensor, mesh: Mesh) -> Tensor:
        """[m b h w] from 0 to 1, of all networks."""
        seen = self._turns[0].evidence(
            images,
            labels,
            networks=self._config.networks_looking,
            classes=self._classes,
            all_sum=mesh.sum_over_backbones,
        )
        return scaled_maps(seen.maps)

    def _ratio(self, images: Tensor, labels: Tensor, mesh: Mesh) -> Tensor:
        """Sum over images of the meta-feature ratio, of some at a time."""
        parts = zip(images.split(IMAGES_AT_A_TIME), labels.split(IMAGES_AT_A_TIME), strict=True)
        ratios = [meta_feature_ratio(self._maps(*part, mesh), self._settings.threshold).sum() for part in parts]
        return torch.stack(ratios).sum()

    def keep_maps(self, place: Location, mesh: Mesh, initial: Tensor, final: SyntheticSet) -> None:
        """Write what the networks see in some images before and after, and the meta-feature ratio of all.

        Args:
            initial: [n c h w] the images that this worker holds, as they were before the first iteration.
        """
        labels, ratios = final.labels, []
        arrays: dict[str, NDArray[np.generic]] = {}
        shown = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:MAPS_SHOWN]])
        for name, images in (("initial", initial), ("final", final.images)):
            ratio = self._ratio(images, labels, mesh)
            ratios.append(float(mesh.sum_over_classes(ratio)) / self._images)
            maps = mesh.gather(self._maps(images[shown], labels[shown], mesh).transpose(0, 1))
            if maps is not None:
                arrays[name] = maps[:MAPS_SHOWN].transpose(0, 1).cpu().numpy()
        rows = mesh.gather(shown + self._rows.first)
        if mesh.is_first and rows is not None:
            arrays["rows"] = rows[:MAPS_SHOWN].cpu().numpy()
            looking = network_names([each.network for each in (self._config, *self._config.each_auxiliary())])
            told = {"networks": looking, "ratios": ratios, "threshold": self._settings.threshold}
            write_tensors(place, arrays, kind=MAPS_KIND, metadata=told)
