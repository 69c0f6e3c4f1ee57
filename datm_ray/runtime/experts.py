"""Training experts: one task, one expert, one file in the trajectory store."""

from __future__ import annotations

import re
from collections.abc import Iterator

from datm_ray.config import ClusterConfig, RunConfig, expert_fingerprint
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork, flatten
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.training import Schedule, train
from datm_ray.data.dataset import Dataset
from datm_ray.runtime.executor import Finished, Progress, prepare_device, to_device
from datm_ray.store.trajectories import ExpertGroup, Snapshot, TrajectoryInfo, TrajectoryStore


def network_spec(config: RunConfig, channels: int, size: tuple[int, int], classes: int) -> NetworkSpec:
    """The backbone of a run, for images of that shape."""
    return NetworkSpec(channels=channels, size=size, classes=classes, **config.network.model_dump())


def expert_group(store_uri: str, config: RunConfig, dataset: str, dataset_fingerprint: str) -> ExpertGroup:
    """Where the experts of a run lie in the store."""
    store = TrajectoryStore(store_uri)
    fingerprint = expert_fingerprint(config, dataset_fingerprint)
    # A data set may be named after any folder; the fingerprint tells apart what becomes the same name here.
    folder = re.sub(r"[^A-Za-z0-9._+=-]+", "-", dataset).lstrip("._+=-") or "dataset"
    return store.group(folder, config.network.architecture, fingerprint)


class ExpertWorker:
    """Trains experts on one data set."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._dataset = dataset
        self._images = to_device(dataset.train_images, self._device)
        self._labels = to_device(dataset.train_labels, self._device)

    def train(self, config: RunConfig, store_uri: str, expert: int) -> Iterator[Progress | Finished]:
        """Train one expert and commit its trajectory; what is already committed is left alone."""
        dataset = self._dataset
        group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
        if expert in group.experts():
            yield Finished()
            return
        seed = derive_seed(config.seed, Purpose.EXPERT, expert)
        spec = network_spec(config, dataset.channels, dataset.size, dataset.classes)
        network = build_network(spec, seed).to(self._device)
        flat = FlatNetwork(network)
        snapshots = [Snapshot(0, 0, float("nan"), float("nan"), flatten(network).cpu().numpy())]
        schedule = Schedule(
            epochs=config.experts.epochs,
            batch_size=config.experts.batch_size,
            learning_rate=config.experts.learning_rate,
            momentum=config.experts.momentum,
            weight_decay=config.experts.weight_decay,
            augmentation=config.experts.augmentation,
        )
        for epoch in train(network, self._images, self._labels, schedule, seed):
            parameters = flatten(network).cpu().numpy()
            snapshots.append(Snapshot(epoch.number, epoch.step, epoch.loss, float("nan"), parameters))
            yield Progress(epoch.number, schedule.epochs, {"loss": epoch.loss})
        info = TrajectoryInfo(
            dataset=group.key.dataset,
            dataset_fingerprint=dataset.fingerprint,
            architecture=config.network.architecture,
            recipe={"network": config.network.model_dump(), "experts": config.experts.model_dump(exclude={"count"})},
            fingerprint=group.key.fingerprint,
            seed=seed,
            expert=expert,
            parameter_names=flat.names,
            parameter_shapes=flat.shapes,
            epochs=tuple(snapshot.epoch for snapshot in snapshots),
        )
        group.write_expert(expert, snapshots, info)
        yield Finished()
