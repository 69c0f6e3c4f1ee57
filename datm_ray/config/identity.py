"""Identity of results: plain data that is equal for two runs with the same set, and fingerprints of experts.

Tests: tests/test_config.py.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datm_ray.config.schema import RunConfig
from datm_ray.config.sections import UNRESOLVED, RecoverConfig, SelectConfig

LATER_KEYS = {"real_batch": 256, "options": {}, "initial": "correct", "labels": "soft", "gradient_limit": None}
"""Keys of `distill` that earlier versions lacked -> value that their runs used."""
LATER_EXPERT_KEYS = {"schedule": "constant", "warmup_epochs": 0}
"""Keys of experts that earlier versions lacked -> value that their experts used."""
READ_BY_ONE_METHOD = {"recover": ("sre2l", RecoverConfig()), "select": ("select", SelectConfig())}
"""Sections that one packaged method reads -> the method, and the section's default values."""
SCORING_KEYS = (
    *("labels", "temperature", "cutmix", "keep_labels", "top_logits", "learning_rate"),
    *("schedule", "warmup_epochs", "epochs", "batch_size", "weight_decay"),
)
"""Keys of `evaluate` that affect how networks are scored, but not the set."""


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Plain data that decides the synthetic set and each single accuracy. The run must be resolved.

    `cluster` is left out. The data set's path is left out, because the data set's content has its own fingerprint.
    Number of seeds, further networks, their optimiser, `full`, `fair` and `SCORING_KEYS` are left out, because they may
    change in a finished run. Stored epochs beyond the matched ones, measurements of test accuracy, and the interval of
    checkpoints are left out, because the set does not depend on them.
    """
    left_out: dict[str, Any] = {
        "cluster": True,
        "dataset": {"path"},
        "distill": {"checkpoint_every"},
        "evaluate": {"seeds", "networks", "optimiser", "full", "fair", *SCORING_KEYS},
        "experts": {"keep_epochs", "test_every"},
    }
    identity = config.model_dump(exclude=left_out)
    starts = config.distill.start_epochs
    identity["distill"].pop("start_epochs")
    identity["distill"] |= {  # the keys of earlier versions, whose runs keep their identity
        "first_start": starts.first,
        "start_bound": starts.bound,
        "final_start_bound": starts.last + 1,
        "expand_iterations": starts.expand_iterations,
    }
    if config.method == "datm":  # keeps the identity of runs made before the key existed
        identity.pop("method")
    for name, default in LATER_KEYS.items():
        if identity["distill"][name] == default:  # keeps the identity of runs made before the key existed
            identity["distill"].pop(name)
    for name, (method, default) in READ_BY_ONE_METHOD.items():
        if config.method != method and getattr(config, name) == default:  # no other packaged method reads it
            identity.pop(name)
    identity["experts"] = _without_later_keys(identity["experts"])
    if config.metadd is None:  # keeps the identity of runs made before the section existed
        identity.pop("metadd")
    else:
        for name in ("keep_epochs", "test_every"):
            identity["metadd"]["experts"].pop(name)
        identity["metadd"]["experts"] = _without_later_keys(identity["metadd"]["experts"])
    return identity


def _without_later_keys(experts: dict[str, Any]) -> dict[str, Any]:
    """Settings of experts. Leaves out keys that earlier versions lacked if they have the value those versions used."""
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
    return stable_hash(
        {
            "dataset": dataset_fingerprint,
            "normalisation": config.dataset.kind,
            "network": config.network.model_dump(),
            "experts": recipe,
            "seed": config.seed,
        }
    )
