"""Difficulty of the real images, for experts that see them from easy to hard (`experts.curriculum`).

One task trains some networks as other experts are trained, a stack at a time, and stores the mean of their EL2N scores
beside them. Networks that are stored are not trained again, so a lost task resumes. Every run whose networks are
trained alike shares the scores, whatever its curriculum.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.config import RunConfig
from datm_ray.data.dataset import Dataset
from datm_ray.runtime.devices import Meter
from datm_ray.runtime.executor import Event, Finished, Phase, Progress
from datm_ray.stages.curriculum import KIND
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.experts import ExpertWorker, expert_group, experts_at_a_time, stacks
from datm_ray.stages.selection import mean_el2n
from datm_ray.stages.validation import REPORT_INTERVAL
from datm_ray.store.files.filesystem import AlreadyExistsError
from datm_ray.store.tensors import write_tensors


def score_images(worker: ExpertWorker, config: RunConfig, store_uri: str) -> Iterator[Event]:
    """Train the scoring networks that are missing, then store every training image's mean EL2N score over them.

    Args:
        worker: worker that trains, with the data set.
        config: run that trains the scoring networks, see `RunConfig.scoring_run`.
        store_uri: store of the networks and the scores.
    """
    dataset, settings, meter = worker.dataset, config.experts, Meter(worker.device)
    size = experts_at_a_time(config, (dataset.channels, *dataset.size), dataset.classes)
    parts = stacks(range(settings.count), size, settings.count)
    for number, stack in enumerate(parts):
        for event in worker.train(config, store_uri, stack):
            if isinstance(event, Progress):
                done, total = number * settings.epochs + event.done, len(parts) * settings.epochs
                yield Progress(done, total, event.values, saved=event.saved)
            elif not isinstance(event, Finished):
                yield event
    group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
    place = group.difficulty_file(settings.count)
    if not place.exists():
        scores = yield from _scores(config, dataset, store_uri, worker.device)
        metadata = {"score": "el2n", "networks": settings.count, "epochs": settings.epochs}
        with suppress(AlreadyExistsError):  # another command's scores, which its experts may follow already
            write_tensors(place, {"scores": scores}, kind=KIND, metadata=metadata, replace=False)
    yield Finished(metrics=meter.measure())


def _scores(
    config: RunConfig, dataset: Dataset, store_uri: str, device: torch.device
) -> Generator[Event, None, NDArray[np.float64]]:
    """Return the mean EL2N score [n] of every training image. Yields a phase from time to time."""
    experts, labels = ExpertNetworks(config, dataset, store_uri, device), dataset.train_labels
    rows = {k: np.flatnonzero(labels == k) for k in range(dataset.classes)}
    networks = (experts.restored(expert).eval() for expert in range(experts.count))
    steps = mean_el2n(networks, experts.count, rows, lambda own: torch.from_numpy(dataset.train_images[own]).to(device))
    due = 0.0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            scores = np.empty(len(labels))
            for k, of_class in end.value.items():
                scores[rows[k]] = of_class
            return scores
        if time.monotonic() >= due:
            yield Phase("scoring the images")
            due = time.monotonic() + REPORT_INTERVAL
