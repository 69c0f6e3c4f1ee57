"""Order of the training images from easy to hard (`experts.curriculum`), by the scores that `difficulty` has stored."""

from __future__ import annotations

import numpy as np

from datm_ray.config import RunConfig
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.data.dataset import Dataset
from datm_ray.errors import MissingExpertsError
from datm_ray.methods.selection import drawn_order, keep
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors
from datm_ray.store.trajectories import ExpertGroup

KIND = "difficulty"


def curriculum_of(config: RunConfig, dataset: Dataset, scoring: ExpertGroup) -> Curriculum:
    """Curriculum of a run's experts, for a recipe with `experts.curriculum`: which images they see in an epoch.

    Images of a class with equal scores are in a random order, which depends on the experts' seed.

    Args:
        scoring: folder of the networks whose scores order the images, see `RunConfig.scoring_run`.

    Raises:
        MissingExpertsError: the scores are not stored.
        CorruptFileError: the file of scores is damaged, or has scores of other images.
    """
    settings, labels = config.experts.curriculum, dataset.train_labels
    assert settings is not None
    place = scoring.difficulty_file(settings.scoring_networks)
    if not place.exists():
        raise MissingExpertsError(
            f"{scoring.location.uri} holds no scores of the images, which experts.curriculum needs",
            "no command has scored them yet",
            f"run `datm-ray experts {config.name}` with the same --set, --out and --store",
        )
    with rejecting_nonsense(place):
        scores = read_tensors(place, kind=KIND).arrays["scores"]
        if scores.shape != labels.shape:
            raise ValueError(f"it has {len(scores)} scores for {len(labels)} images")
    drawn = (drawn_order(np.flatnonzero(labels == k), config.expert_seed, k) for k in range(dataset.classes))
    return Curriculum(settings, [own[keep(scores[own], len(own))] for own in drawn])
