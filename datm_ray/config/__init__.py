"""The configuration of a run: what is computed, and how it is spread over a cluster.

A run is one YAML file or a packaged recipe. A wrong key or value raises a `ConfigError` of one line before anything
starts. Needs the standard library, pydantic and PyYAML.
"""

from datm_ray.config.files import load_config_text, load_recipe_of_run, override, to_yaml, with_settings
from datm_ray.config.identity import (
    expert_fingerprint,
    prior_fingerprint,
    recipe_of_set,
    run_identity,
    scoring_identity,
    stable_hash,
    unread_keys,
    unread_values,
)
from datm_ray.config.networks import networks_named, scored_on, short_names
from datm_ray.config.schema import Role, RunConfig, parse_config
from datm_ray.config.sections import (
    PUBLISHED_AUGMENTATION,
    AuxiliaryExpertConfig,
    BackboneConfig,
    ClusterConfig,
    CurriculumConfig,
    DatasetConfig,
    DistillConfig,
    EvaluateConfig,
    ExpertConfig,
    MetaConfig,
    MetaLossConfig,
    NetworkConfig,
    NetworkSpec,
    PriorConfig,
    RecoverConfig,
    Section,
    SelectConfig,
    StartEpochs,
    WorkerShape,
    parse_bytes,
)

__all__ = [
    "PUBLISHED_AUGMENTATION",
    "AuxiliaryExpertConfig",
    "BackboneConfig",
    "ClusterConfig",
    "CurriculumConfig",
    "DatasetConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExpertConfig",
    "MetaConfig",
    "MetaLossConfig",
    "NetworkConfig",
    "NetworkSpec",
    "PriorConfig",
    "RecoverConfig",
    "Role",
    "RunConfig",
    "Section",
    "SelectConfig",
    "StartEpochs",
    "WorkerShape",
    "expert_fingerprint",
    "load_config_text",
    "load_recipe_of_run",
    "networks_named",
    "override",
    "parse_bytes",
    "parse_config",
    "prior_fingerprint",
    "recipe_of_set",
    "run_identity",
    "scored_on",
    "scoring_identity",
    "short_names",
    "stable_hash",
    "to_yaml",
    "unread_keys",
    "unread_values",
    "with_settings",
]
