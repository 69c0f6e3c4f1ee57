"""Difficulty of the real images, for experts that see them from easy to hard (`experts.curriculum`).

Scoring networks are trained as experts are, in separate tasks and a separate folder of the store. One short task then
stores the mean of their EL2N scores in the same folder. All runs whose scoring networks are trained alike share the
scores, whatever their curriculum.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.core.training.loop import in_batches
from datm_ray.data.dataset import Dataset
from datm_ray.methods.selection import Work, el2n_scores
from datm_ray.monitor.spent import Account
from datm_ray.runtime.executor import Event, Finished
from datm_ray.runtime.heartbeats import reporting
from datm_ray.stages.experts.curriculum import KIND
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import REPORT_INTERVAL
from datm_ray.stages.experts.train import ExpertWorker, expert_group
from datm_ray.store.files.filesystem import AlreadyExistsError
from datm_ray.store.tensors import write_tensors


def score_images(worker: ExpertWorker, config: RunConfig, store_uri: str) -> Iterator[Event]:
    """Store every training image's EL2N score, a mean over the scoring networks. Does nothing if scores are stored.

    A network's score is the norm of its error (softmax minus one-hot class), so hard images have high scores.

    Args:
        worker: worker that holds the data set. The worker's device computes.
        config: run that trained the scoring networks, see `RunConfig.scoring_run`.
        store_uri: store of the networks and the scores.

    Raises:
        MissingExpertsError: the store lacks a scoring network.
    """
    dataset, settings, account = worker.dataset, config.experts, Account(worker.device, config.cluster)
    group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
    place = group.difficulty_file(settings.count)
    if not place.exists():
        scores = yield from _scores(config, dataset, store_uri, worker.device)
        metadata = {"score": "el2n", "networks": settings.count, "epochs": settings.epochs}
        with suppress(AlreadyExistsError):  # another command stored scores meanwhile; its experts may use them
            write_tensors(place, {"scores": scores}, kind=KIND, metadata=metadata, replace=False)
    yield Finished(metrics=account.metrics())


def _scores(
    config: RunConfig, dataset: Dataset, store_uri: str, device: torch.device
) -> Generator[Event, None, NDArray[np.float64]]:
    """Compute and return the mean EL2N score [n] of every training image. Yields a phase as a heartbeat."""
    experts, labels = ExpertNetworks(config, dataset, store_uri, device), dataset.train_labels
    rows = {k: np.flatnonzero(labels == k) for k in range(dataset.classes)}
    networks = (experts.restored(expert).eval() for expert in range(experts.count))
    steps = mean_el2n(networks, experts.count, rows, lambda own: torch.from_numpy(dataset.train_images[own]).to(device))
    found = yield from reporting(steps, "scoring the images", REPORT_INTERVAL)
    scores = np.empty(len(labels))
    for k, of_class in found.items():
        scores[rows[k]] = of_class
    return scores


def mean_el2n(
    networks: Iterable[nn.Module],
    count: int,
    rows: Mapping[int, NDArray[np.int64]],
    images: Callable[[NDArray[np.int64]], Tensor],
) -> Work:
    """Compute the mean EL2N score of each image over networks. Returns class -> scores [n] of its images.

    Yields after each batch. A score is the norm of the difference of softmax and one-hot class.

    Args:
        networks: networks in evaluation mode, which are used one at a time.
        count: number of networks.
        rows: class -> indices of its images.
        images: function from indices to real images [n c h w] on the networks' device.
    """
    found = {label: np.zeros(len(own)) for label, own in rows.items()}
    for network in networks:
        for label, own in rows.items():
            logits = yield from in_batches(lambda batch, network=network: network(images(batch)), own)  # type: ignore[misc]
            found[label] += el2n_scores(logits, torch.full((len(own),), label)) / count
    return found
