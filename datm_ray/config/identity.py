"""Identity of results: plain data that is equal for two runs with the same set, and fingerprints of experts.

Tests: tests/test_config.py.
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
    UNREAD_BY_MATCHING,
    UNRESOLVED,
    DistillConfig,
    keys_read_of_distill,
)

LATER_KEYS: dict[str, Any] = {
    **{"real_batch": 256, "options": {}, "initial": "correct", "labels": "soft", "gradient_limit": None},
    **{"unmatched_share": 0.0, "average_decay": None},
}
"""Keys of `distill` that earlier versions lacked -> value that their runs used."""
LATER_EXPERT_KEYS = {"schedule": "constant", "warmup_epochs": 0, "precision": "float32", "curriculum": None}
"""Keys of experts that earlier versions lacked -> value that their experts used."""
SECTIONS_OF_METHODS = {"recover": "sre2l", "select": "select"}
"""Section that only one packaged method reads -> that method."""
SCORING_KEYS = (
    *("labels", "temperature", "cutmix", "keep_labels", "top_logits", "learning_rate"),
    *("schedule", "warmup_epochs", "epochs", "batch_size", "weight_decay"),
)
"""Keys of `evaluate` that affect how networks are scored, but not the set."""


def unread_keys(config: RunConfig) -> list[str]:
    """Keys of `distill`, such as `distill.threshold`, and whole sections that the run's method does not read.

    Empty for a method of the user's own, which may read any key.
    """
    if config.method not in {*UNREAD_BY_MATCHING, *READ_OF_DISTILL}:
        return []
    read = keys_read_of_distill(config.method)
    unread = [f"distill.{name}" for name in DistillConfig.model_fields if name not in read]
    return unread + [name for name, method in SECTIONS_OF_METHODS.items() if method != config.method]


def unread_values(config: RunConfig) -> dict[str, Any]:
    """Keys that the run sets to other values than the default, but its method does not read: key -> plain value."""
    default, found = RunConfig().model_dump(mode="json"), config.model_dump(mode="json")
    paths = {key: key.split(".") for key in unread_keys(config)}
    values = {key: (reduce(getitem, path, found), reduce(getitem, path, default)) for key, path in paths.items()}
    return {key: value for key, (value, usual) in values.items() if value != usual}


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Plain data that decides the synthetic set and each single accuracy. The run must be resolved.

    `cluster`, except `cluster.deterministic` if it is true, and the keys that the run's method does not read are left
    out. The data set's path is left out, because the data set's content has its own fingerprint. Number of seeds,
    further networks, their optimiser, `full`, `fair` and `SCORING_KEYS` are left out, because they may change in a
    finished run. Stored epochs beyond the matched ones, measurements of test accuracy, and the interval of checkpoints
    are left out, because the set does not depend on them.
    """
    left_out: dict[str, Any] = {
        "cluster": True,
        "dataset": {"path"},
        "distill": {"checkpoint_every"},
        "evaluate": {"seeds", "networks", "optimiser", "full", "fair", *SCORING_KEYS},
        "experts": {"keep_epochs", "test_every"},
    }
    identity = config.model_dump(exclude=left_out)
    for key in unread_keys(config):
        section, _, name = key.partition(".")
        (identity[section] if name else identity).pop(name or section, None)
    if not config.dataset.streamed:  # keeps the identity of runs made before the key existed
        identity["dataset"].pop("streamed")
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
    if config.dataset.statistics is None:  # keeps the identity of runs made before the keys existed
        identity["dataset"].pop("mean")
        identity["dataset"].pop("std")
    if config.method == "datm":  # keeps the identity of runs made before the key existed
        identity.pop("method")
    for name, default in LATER_KEYS.items():
        if identity["distill"].get(name, ...) == default:  # keeps the identity of runs made before the key existed
            identity["distill"].pop(name)
    identity["experts"] = _without_later_keys(identity["experts"])
    if config.prior is None:  # keeps the identity of runs made before the section existed
        identity.pop("prior")
    if config.metadd is None:  # keeps the identity of runs made before the section existed
        identity.pop("metadd")
    else:
        for name in ("keep_epochs", "test_every"):
            identity["metadd"]["experts"].pop(name)
        identity["metadd"]["experts"] = _without_later_keys(identity["metadd"]["experts"])
    return identity


def _without_later_keys(experts: dict[str, Any]) -> dict[str, Any]:
    """Settings of experts without the keys of `LATER_EXPERT_KEYS` that have the value given there."""
    return {name: value for name, value in experts.items() if LATER_EXPERT_KEYS.get(name, ...) != value}


def scoring_identity(config: RunConfig) -> dict[str, Any]:
    """Values of `SCORING_KEYS` that differ from their defaults."""
    return config.evaluate.model_dump(include=set(SCORING_KEYS), exclude_defaults=True)


def recipe_of_set(config: RunConfig) -> dict[str, Any]:
    """Recipe that a set's file stores: the run's identity, and the settings that scored the set."""
    identity, scored = run_identity(config), scoring_identity(config)
    if config.evaluate.optimiser != "sgd":
        scored["optimiser"] = config.evaluate.optimiser
    return identity | {"evaluate": identity["evaluate"] | scored}


def stable_hash(value: Any) -> str:
    """Hash of plain data, sixteen hex digits; equal data have equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expert_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of the experts that a run needs, sixteen hex digits; equal for two runs if they can share experts.

    Raises:
        ValueError: the configuration is not resolved, see `RunConfig.resolved`.
    """
    if config.network.depth is None:
        raise ValueError(UNRESOLVED)
    recipe = _without_later_keys(config.experts.model_dump(exclude={"count", "keep_epochs", "test_every"}))
    if config.experts.optimiser == "sgd":
        recipe = {name: value for name, value in recipe.items() if name not in ("rho", "alpha", "adaptive")}
    # A group of their own, because scoring networks keep fewer epochs than experts that are trained alike.
    purpose = {"purpose": "scoring"} if isinstance(config, ScoringRun) else {}
    return stable_hash(
        {
            **purpose,
            "dataset": dataset_fingerprint,
            "normalisation": config.dataset.statistics or config.dataset.kind,
            "network": config.network.model_dump(),
            "experts": recipe,
            "seed": config.seed,
        }
    )


def prior_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of a run's trained prior, sixteen hex digits; equal for two runs if they can share it."""
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
