"""Runs of one command, which share an output folder: their configurations, images and experts, and their locations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from datm_ray.artifact import INLINE_BYTES, TRANSFORMS, keep_transform
from datm_ray.config import DatasetConfig, NetworkConfig, RunConfig
from datm_ray.data.dataset import Dataset, prepare, transform_of
from datm_ray.data.patience import Say, silent
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.transform import FitCost, Transform
from datm_ray.pipeline.folder import read_recipe
from datm_ray.shape import DataShape
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.experts.train import expert_group, origins
from datm_ray.stages.methods.registry import method_of, trained_networks
from datm_ray.stages.prior import is_trained, prior_folder
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors
from datm_ray.store.trajectories import PRIOR_FILE, TRANSFORM_KIND, ExpertGroup


class Runs:
    """Runs that one command starts or continues, with the real images of their data sets."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        out: str,
        store: str | None = None,
        *,
        elsewhere: bool = False,
        alone: bool = False,
        asked: Mapping[NetworkConfig, str] | None = None,
    ) -> None:
        """Read the runs' images.

        Args:
            configs: the runs; at least one.
            out: output folder, a path or URI.
            store: trajectory store, a path or URI; `None` puts it into the output folder.
            elsewhere: True if workers may run on other nodes, whose memory and GPUs are not known here.
            alone: True if this process will do all the work, without Ray.
            asked: network to score on -> command-line option that asked for it, for messages; `None` for none.

        Raises:
            DatmError: a data set, path or earlier recipe cannot be read, or a recipe does not fit its data set.
        """
        self.elsewhere, self.alone, self.asked = elsewhere, alone, asked or {}
        self.out = open_location(out)
        # Absolute, because workers resolve it too and may have another working directory.
        self.store_uri = open_location(store).uri if store else (self.out / "experts").uri
        self.datasets: dict[DatasetConfig, RawDataset] = {}
        """Data set in the runs' recipes -> its images as they were read, before normalisation."""
        self._prepared: dict[DatasetConfig, Dataset] = {}
        self.configs = [self._read(config) for config in configs]
        """Recipes of the runs, resolved for their images: no normalisation is "auto" and no depth is null."""

    def _read(self, config: RunConfig) -> RunConfig:
        """Read a run's images, unless another run has read them. Returns the recipe, resolved for the images' size."""
        d = config.dataset
        normalised = {name: getattr(d, name) for name in ("normalisation", "mean", "std")}
        alike = (raw for each, raw in self.datasets.items() if each.model_copy(update=normalised) == d)
        raw = next(alike, None)
        if raw is None:
            copies = 1 if self.alone else 2  # Ray's object store keeps a copy of its own
            raw = load_raw(
                d.source, d.path, resize=d.resize, validation=d.validation, copies=copies, streamed=d.streamed
            )
        made = read_recipe(self.folder(config)) if (self.folder(config) / SYNTHETIC).exists() else None
        config = method_of(config).resolved(config.resolved(raw.size), raw, made)
        self.datasets[config.dataset] = raw
        return config

    def give_gpus(self, amount: float) -> None:
        """Set the number of GPUs per worker in runs whose recipe leaves it open.

        Memory, and how many experts are trained together, depend on this number.
        """
        self.configs = [
            config.model_copy(update={"cluster": config.cluster.given_gpus(amount)}) for config in self.configs
        ]

    def raw(self, config: RunConfig) -> RawDataset:
        """Images of a run as they were read, before normalisation."""
        return self.datasets[config.dataset]

    def shape(self, config: RunConfig) -> DataShape:
        """Shape and number of a run's real images, for estimates of memory and time."""
        raw, streamed = self.raw(config), config.dataset.streamed
        images, held_out = len(raw.train) + len(raw.validation), len(raw.validation)
        return DataShape((raw.channels, *raw.size), raw.classes, images, len(raw.test), streamed, held_out)

    def folder(self, config: RunConfig) -> Location:
        """Folder of a run in the output folder; it may not exist yet."""
        return self.out / config.name

    def unfinished(self) -> list[RunConfig]:
        """Runs whose folder has no final synthetic set yet."""
        return [config for config in self.configs if not (self.folder(config) / SYNTHETIC).exists()]

    def networks(self) -> list[RunConfig]:
        """All networks whose experts the runs need, each as a run with this network alone. Some may share experts."""
        return [each for config in self.configs for each in trained_networks(config)]

    def experts(self, config: RunConfig) -> ExpertGroup:
        """Group of the trajectory store for the experts of a run with one network; it may have no experts yet."""
        raw = self.raw(config)
        return expert_group(self.store_uri, config, raw.name, raw.fingerprint)

    def origins(self, config: RunConfig) -> dict[str, str]:
        """KEY/NUMBER of a run's stored experts -> digest of the weights they were imported with; "" if trained.

        KEY is that of the group of experts, NUMBER the expert's number in the group. To read few files, experts of a
        group after its first trained one with several stored epochs are left out: they are assumed to be trained too.
        """
        found = dict[str, str]()
        for each in trained_networks(config):
            group = self.experts(each)
            found |= {f"{group.key}/{number}": digest for number, digest in origins(group, each.experts.count).items()}
        return found

    def missing_experts(self, config: RunConfig) -> list[int]:
        """Numbers, from 0, of the experts that a run with one network needs and that are missing in the store."""
        done = set(self.experts(config).experts())
        return [expert for expert in range(config.experts.count) if expert not in done]

    def prior(self, config: RunConfig) -> Location:
        """Folder in the store for a run's trained prior; it may not exist yet."""
        raw = self.raw(config)
        return prior_folder(self.store_uri, config, raw.name, raw.fingerprint)

    def missing_priors(self) -> list[RunConfig]:
        """Runs that need a trained prior that is missing in the store; only the first of those that share a prior."""
        found = dict[str, RunConfig]()
        for config in filter(is_trained, self.configs):
            place = self.prior(config) / PRIOR_FILE
            if not place.exists():
                found.setdefault(place.uri, config)
        return list(found.values())

    def fitting_cost(self, dataset: DatasetConfig) -> FitCost:
        """Estimated cost of fitting a data set's transform: bytes of memory and disk, and minutes on two CPU cores."""
        raw = self.datasets[dataset]
        return FitCost.of(dataset.kind, (raw.channels, *raw.size), len(raw.train))

    def stored_transform(self, dataset: DatasetConfig) -> Location | None:
        """File of the data set's normalising transform; `None` if none is stored yet.

        The file beside the runs' experts in the store is preferred to the one in the output folder.
        """
        groups = (self.experts(each) for each in self.networks() if each.dataset == dataset)
        found = next((group.transform_file for group in groups if group.has_transform()), None)
        note = self._transform_note(dataset)
        if found is None and note.exists():
            with rejecting_nonsense(note):
                kept = self.out / TRANSFORMS / str(note.read_json()["file"])
            found = kept if kept.exists() else None
        return found

    def _transform_note(self, dataset: DatasetConfig) -> Location:
        """Location in the output folder of the note that holds the file name of a data set's large transform."""
        return self.out / TRANSFORMS / f"{self.datasets[dataset].fingerprint}-{dataset.kind}.json"

    def dataset(self, dataset: DatasetConfig, say: Say = silent) -> Dataset:
        """Data set, normalised by the transform of the runs' experts. The transform is fitted if none is stored yet.

        A large transform is fitted once for an output folder, even if several commands start at the same time.

        Args:
            dataset: data set of a run.
            say: shows lines about work that takes more than some seconds.
        """
        if dataset not in self._prepared:
            transform = self._read_transform(dataset)
            if transform is None and self.fitting_cost(dataset).stored > INLINE_BYTES:
                with (self.out / TRANSFORMS).locked(partial(say, "waiting for another command, which fits zca here")):
                    transform = self._read_transform(dataset) or self._fit(dataset, say)
                    if keep_transform(transform, self.out / TRANSFORMS):
                        self._transform_note(dataset).write_json({"file": f"{transform.digest}.arrow"})
            transform = transform or self._fit(dataset, say)
            self._prepared[dataset] = prepare(self.datasets[dataset], transform, say=say)
        return self._prepared[dataset]

    def _read_transform(self, dataset: DatasetConfig) -> Transform | None:
        place = self.stored_transform(dataset)
        if place is None:
            return None
        stored = read_tensors(place, kind=TRANSFORM_KIND)
        return Transform.from_arrays(stored.arrays, stored.metadata, place.uri)

    def _fit(self, dataset: DatasetConfig, say: Say) -> Transform:
        # On a cluster this process uses no GPU: a worker may use all memory of this machine's first GPU.
        device = "cuda" if torch.cuda.is_available() and not self.elsewhere else "cpu"
        raw = self.datasets[dataset]
        return transform_of(raw, dataset.kind, dataset.statistics, device=device, say=say)
