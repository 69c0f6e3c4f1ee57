"""First images and labels of a set: real images or noise, labelled by trained networks or by their classes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import Rows, SyntheticSet, correct_rows_in_steps, hard_logits, random_rows
from datm_ray.core.training.loop import SCORING_BATCH
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods.part import Part


def first_set(part: Part, experts: ExpertNetworks | None, step_size: float) -> Steps[SyntheticSet]:
    """Make the images and labels with which this worker's classes start. Yields between steps.

    By default these are real images that experts classify correctly, labelled by the experts' mean logits. The recipe
    may ask for random images or noise instead, or for hard labels.

    Args:
        part: this worker's part in the distillation.
        experts: experts of the first backbone; `None` takes random images or noise, with hard labels.
        step_size: step size of all backbones.
    """
    config, dataset, rows = part.config, part.dataset, part.rows
    step_sizes = torch.full((len(config.weights),), step_size, device=part.device)
    shape = (rows.last - rows.first, dataset.channels, *dataset.size)
    images = torch.zeros(shape, device=part.device)
    soft_labels = torch.zeros(len(images), dataset.classes, device=part.device)
    labels = torch.tensor(rows.classes(config.distill.ipc), device=part.device)
    labels = labels.repeat_interleave(config.distill.ipc)

    def choose() -> Steps[None]:
        if part.mesh.row == 0:
            images.copy_(torch.tensor((yield from _first_images(part, experts))))
            if experts is None or not config.distill.has_soft_labels:
                soft_labels.copy_(hard_logits(labels, dataset.classes))
            else:
                soft_labels.copy_((yield from experts.soft_labels(images, labels)))

    yield from part.mesh.in_steps(choose())
    # Machines may round differently, so only the first row of workers computes. Workers of other rows add zeros, and
    # all get equal bits.
    images, soft_labels = part.mesh.sum_over_backbones(images), part.mesh.sum_over_backbones(soft_labels)
    return SyntheticSet(images, soft_labels, step_sizes, labels)


def _first_images(part: Part, experts: ExpertNetworks | None) -> Steps[NDArray[np.float32]]:
    """Images [n c h w] with which this worker's part of the set starts: real images or noise. Yields between steps."""
    dataset, settings, rows = part.dataset, part.config.distill, slice(part.rows.first, part.rows.last)
    if settings.initial == "noise":
        shape = (settings.ipc * dataset.classes, *part.dataset.image_shape)
        return generator(part.config.seed, Purpose.INITIAL_NOISE).standard_normal(shape, np.float32)[rows]
    return dataset.train_images[(yield from first_rows(part, experts, part.rows))]


def first_rows(part: Part, experts: ExpertNetworks | None, rows: Rows) -> Steps[NDArray[np.int64]]:
    """Choose the training images from which a range of the set's images starts, and return their indices.

    Yields after each batch that an expert classifies. The images are correctly classified ones or random ones, see
    `distill.initial`.

    Args:
        part: this worker's part in the distillation.
        experts: networks that decide which images are classified correctly; `None` chooses random images.
        rows: range of the set's images, which must be those of whole classes.
    """
    dataset, settings = part.dataset, part.config.distill
    if settings.initial == "random" or experts is None:
        return random_rows(dataset.train_labels, settings.ipc, part.config.seed)[rows.first : rows.last]

    def predict(expert: int, asked: NDArray[np.int64]) -> Steps[NDArray[np.int64]]:
        found = [np.empty(0, np.int64)]  # `asked` may be empty
        for first in range(0, len(asked), SCORING_BATCH):  # the candidates of many classes may not fit into memory
            images = torch.from_numpy(dataset.train_images[asked[first : first + SCORING_BATCH]]).to(part.device)
            logits = yield from experts.logits_in_steps(expert, images)
            found.append(logits.argmax(dim=1).cpu().numpy())
        return np.concatenate(found)

    return (
        yield from correct_rows_in_steps(
            dataset.train_labels,
            settings.ipc,
            part.config.seed,
            experts=experts.count,
            predict=predict,
            classes=rows.classes(settings.ipc),
        )
    )
