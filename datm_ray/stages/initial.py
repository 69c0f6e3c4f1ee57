"""The set before the first iteration: real images, and their labels by trained networks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.core.synthetic import SyntheticSet, correct_rows, hard_logits, random_rows
from datm_ray.core.training import Heartbeat
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.method import Part


def initial_set(part: Part, experts: ExpertNetworks) -> SyntheticSet:
    """Choose the first rows of this shard: real images that experts classify correctly, with their mean logits.

    The recipe may ask for any images, or for hard labels. A step size that it leaves open is a likely one.
    """
    config, dataset, rows = part.config, part.dataset, part.rows
    distance = Distance.of(config, len(dataset.train_labels))
    step_size = distance.step_size or distance.likely_step_size
    step_sizes = torch.full((len(config.weights),), step_size, device=part.device)
    shape = (rows.last - rows.first, dataset.channels, *dataset.size)
    images = torch.zeros(shape, device=part.device)
    soft_labels = torch.zeros(len(images), dataset.classes, device=part.device)
    labels = torch.tensor(rows.classes(config.distill.ipc), device=part.device)
    labels = labels.repeat_interleave(config.distill.ipc)

    def choose(heartbeat: Heartbeat) -> None:
        if part.mesh.row == 0:
            images.copy_(torch.tensor(dataset.train_images[_initial_rows(part, experts, heartbeat)]))
            if config.distill.labels == "hard":
                soft_labels.copy_(hard_logits(labels, dataset.classes))
            else:
                soft_labels.copy_(experts.soft_labels(images, labels, heartbeat))

    part.mesh.until_all_are_done(choose)
    # The other backbones' workers get these bits, because machines may round differently; x + 0 is x.
    images, soft_labels = part.mesh.sum_over_backbones(images), part.mesh.sum_over_backbones(soft_labels)
    return SyntheticSet(images, soft_labels, step_sizes, labels)


def _initial_rows(part: Part, experts: ExpertNetworks, heartbeat: Heartbeat) -> NDArray[np.int64]:
    dataset, settings = part.dataset, part.config.distill
    if settings.initial == "random":
        return random_rows(dataset.train_labels, settings.ipc, part.config.seed)[part.rows.first : part.rows.last]

    def predict(expert: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        images = torch.tensor(dataset.train_images[rows], device=part.device)
        return experts.logits(expert, images, heartbeat).argmax(dim=1).cpu().numpy()

    return correct_rows(
        dataset.train_labels,
        settings.ipc,
        part.config.seed,
        experts=experts.count,
        predict=predict,
        classes=part.rows.classes(settings.ipc),
    )
