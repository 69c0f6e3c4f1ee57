"""Bytes of a synthetic set: of its images, and of the labels that networks were scored with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from datm_ray.artifact import Artifact
from datm_ray.config import RunConfig
from datm_ray.core.synthetic import hard_logits
from datm_ray.stages.labels import kept_labels
from datm_ray.store.files.filesystem import Location
from datm_ray.store.labels import LabelStore


@dataclass(frozen=True)
class SetBytes:
    """Bytes of a set as networks are trained on it, without transform, names and provenance."""

    images: int
    """Bytes of the images in the type in which the set's file has them, 32-bit floats."""
    labels: int | None
    """Bytes of the labels: one class or k logits for each image, or the files of a label store. `None` if a teacher
    labels every batch, so that no labels are kept, or if stored labels are not made yet."""


def set_bytes(config: RunConfig, artifact: Artifact, labels: Location | None) -> SetBytes:
    """Bytes of a run's finished set and of the labels that score it.

    Args:
        config: recipe of the run.
        artifact: the set.
        labels: folder of the label store; `None` if no labels are stored.
    """
    if not config.evaluate.has_teacher:
        return SetBytes(artifact.images.nbytes, _own_labels(artifact))
    stored = None if labels is None else LabelStore(labels, keep=kept_labels(config)).nbytes
    return SetBytes(artifact.images.nbytes, stored)


def _own_labels(artifact: Artifact) -> int:
    """Bytes of the labels in a set's file: those of the classes if the soft labels say no more, else of the logits."""
    hard = hard_logits(artifact.labels, len(artifact.class_names))
    return artifact.labels.nbytes if torch.equal(artifact.soft_labels, hard) else artifact.soft_labels.nbytes
