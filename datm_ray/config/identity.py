"""Identity of a run: the settings that decide its synthetic set; fingerprints of experts and priors.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from operator import getitem
from typing import Any

from datm_ray.config.schema import RunConfig, ScoringRun
from datm_ray.config.sections import (
    READ_OF_DISTILL,
    SECTIONS_OF_METHODS,
    UNREAD_BY_MATCHING,
    UNRESOLVED,
    DistillConfig,
    keys_read_of_distill,
)

LATER_KEYS: dict[str, Any] = {"method": "datm", "prior": None, "metadd": None, "given": None}
"""Keys and sections that earlier versions lacked -> value that their runs used. An identity leaves out a key that has
this value, so that earlier runs keep their identity."""
LATER_KEYS_OF_SECTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"streamed": False, "mean": None, "std": None},
    "experts": {"seed": None, "schedule": "constant", "warmup_epochs": 0, "precision": "float32", "curriculum": None},
    "distill": {
        **{"real_batch": 256, "options": {}, "initial": "correct", "labels": "soft", "gradient_limit": None},
        **{"unmatched_share": 0.0, "average_decay": None},
    },
    "recover": {"statistics_of": "teacher", "restarts": "all"},
}
"""Section -> key that earlier versions lacked -> value that their runs used. An identity leaves out a key that has this
value, so that earlier runs keep their identity."""
SCORING_KEYS = (
    *("labels", "temperature", "cutmix", "keep_labels", "top_logits", "learning_rate"),
    *("schedule", "warmup_epochs", "epochs", "batch_size", "micro_batch", "weight_decay"),
)
"""Keys of `evaluate` that affect how networks are trained on the set and scored, but not the set itself."""


def _is_packaged(config: RunConfig) -> bool:
    """True if the run's method comes with the package, False for one of the user's own."""
    return config.method in {*UNREAD_BY_MATCHING, *READ_OF_DISTILL}


def unread_keys(config: RunConfig) -> list[str]:
    """Keys of `distill`, such as `distill.threshold`, and whole sections that the run's method does not read.

    Empty for a method of the user's own, which may read any key.
    """
    if not _is_packaged(config):
        return []
    read = keys_read_of_distill(config.method)
    unread = [f"distill.{name}" for name in DistillConfig.model_fields if name not in read]
    also = {"select"} if config.method == "sre2l" and config.distill.initial == "crops" else set[str]()
    return unread + [
        name for name, method in SECTIONS_OF_METHODS.items() if method != config.method and name not in also
    ]


def unread_values(config: RunConfig) -> dict[str, Any]:
    """Values, other than the defaults, that the run's method does not read: key, as in `unread_keys` -> plain value."""
    default, found = RunConfig().model_dump(mode="json"), config.model_dump(mode="json")
    paths = {key: key.split(".") for key in unread_keys(config)}
    values = {key: (reduce(getitem, path, found), reduce(getitem, path, default)) for key, path in paths.items()}
    return {key: value for key, (value, usual) in values.items() if value != usual}


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Settings of a run, as plain data, by which two runs are compared: equal ones give the same synthetic set.

    The configuration must be one that `RunConfig.resolved` returned. Of `evaluate` only `protocol`, `augmentation` and
    `real_epochs` stay. These settings are left out:

    - `cluster`, except `cluster.deterministic` if it is true, and keys that the run's method does not read;
    - paths of the data set and of a given set, whose contents have fingerprints of their own;
    - keys of `evaluate` that may change in a finished run: number of seeds, further networks, the optimiser, keys that
      add rows to the accuracy table (`full`, `fair`, `fixed_labels`), `teacher` and `SCORING_KEYS`;
    - keys on which the set does not depend: `keep_epochs` and `test_every` of experts, the interval of checkpoints, and
      the run that is continued.
    """
    left_out: dict[str, Any] = {
        "cluster": True,
        "dataset": {"path"},
        "distill": {"checkpoint_every", "continue_from"},
        "evaluate": {"seeds", "networks", "optimiser", "full", "fair", "fixed_labels", "teacher", *SCORING_KEYS},
        "experts": {"keep_epochs", "test_every"},
        "given": {"path"},
        "metadd": {"experts": {"keep_epochs", "test_every"}},
    }
    identity = config.model_dump(exclude=left_out)
    for key in unread_keys(config):
        section, _, name = key.partition(".")
        (identity[section] if name else identity).pop(name or section, None)
    if config.cluster.deterministic:
        identity["cluster"] = {"deterministic": True}
    starts = config.distill.start_epochs
    if identity["distill"].pop("start_epochs", None):
        identity["distill"] |= {  # the keys of earlier versions, whose runs keep their identity
            "first_start": starts.first,
            "start_bound": starts.bound,
            "final_start_bound": starts.last + 1,
            "expand_iterations": starts.expand_iterations,
        }
    if config.expert_seed == config.seed:
        identity["experts"]["seed"] = None
    if config.recover.rounds == 1 and "recover" in identity:
        del identity["recover"]["restarts"]  # a single round never restarts
    for section in LATER_KEYS_OF_SECTIONS.keys() & identity.keys():
        identity[section] = _without(LATER_KEYS_OF_SECTIONS[section], identity[section])
    if config.metadd is not None:
        identity["metadd"]["experts"] = _without(LATER_KEYS_OF_SECTIONS["experts"], identity["metadd"]["experts"])
        if _meta_networks_see_what_they_saw(config):
            del identity["metadd"]["augmented"]
    return _without(LATER_KEYS, identity)


def _meta_networks_see_what_they_saw(config: RunConfig) -> bool:
    """True if MetaDD's networks see the same images as in runs of earlier versions, which lacked `metadd.augmented`.

    In earlier versions these networks saw augmented images with method sre2l, and unaugmented images with other
    methods. A packaged method other than sre2l gives unaugmented images, whatever the key says, if
    `distill.augmentation` is empty.
    """
    assert config.metadd is not None
    if config.method == "sre2l":
        return config.metadd.augmented
    return not config.metadd.augmented or (_is_packaged(config) and not config.distill.augmentation)


def _without(usual: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Copy of `values` without the keys whose value in `usual` is equal."""
    return {name: value for name, value in values.items() if usual.get(name, ...) != value}


def scoring_identity(config: RunConfig) -> dict[str, Any]:
    """Values of `SCORING_KEYS` that differ from their defaults: key of `evaluate` -> value."""
    return config.evaluate.model_dump(include=set(SCORING_KEYS), exclude_defaults=True)


def recipe_of_set(config: RunConfig) -> dict[str, Any]:
    """Recipe that a set's file stores: the run's identity, and the settings that scored the set."""
    identity, scored = run_identity(config), scoring_identity(config)
    if config.evaluate.optimiser != "sgd":
        scored["optimiser"] = config.evaluate.optimiser
    for teacher in config.own_teacher():
        scored["teacher"] = {"network": teacher.network.model_dump(), "experts": teacher.experts.model_dump()}
    return identity | {"evaluate": identity["evaluate"] | scored}


def stable_hash(value: Any) -> str:
    """Hash, sixteen hex digits, of data that JSON can hold; equal data have equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expert_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of the experts that a run needs, sixteen hex digits; equal for two runs if they can share experts.

    Args:
        config: a configuration that `RunConfig.resolved` returned; only its `network` counts, not its backbones.
        dataset_fingerprint: fingerprint of the data set's images.

    Raises:
        ValueError: the configuration is not resolved.
    """
    if config.network.depth is None:
        raise ValueError(UNRESOLVED)
    experts = config.experts.model_dump(exclude={"count", "seed", "keep_epochs", "test_every"})
    recipe = _without(LATER_KEYS_OF_SECTIONS["experts"], experts)
    if config.experts.optimiser == "sgd":
        recipe = {name: value for name, value in recipe.items() if name not in ("rho", "alpha", "adaptive")}
    # Scoring networks have a fingerprint of their own: they keep fewer epochs than experts trained in the same way.
    purpose = {"purpose": "scoring"} if isinstance(config, ScoringRun) else {}
    return stable_hash(
        {
            **purpose,
            "dataset": dataset_fingerprint,
            "normalisation": config.dataset.statistics or config.dataset.kind,
            "network": config.network.model_dump(),
            "experts": recipe,
            "seed": config.expert_seed,
        }
    )


def prior_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of a run's trained prior, sixteen hex digits; equal for two runs if they can share it.

    Raises:
        ValueError: the normalisation is still "auto", because the configuration is not resolved.
    """
    assert config.prior is not None
    settings = config.prior.model_dump(exclude={"kind", "inversion_steps"})
    return stable_hash(
        {
            "dataset": dataset_fingerprint,
            "normalisation": config.dataset.kind,
            "prior": settings,
            "seed": config.seed,
        }
    )
