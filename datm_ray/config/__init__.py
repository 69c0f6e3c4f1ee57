"""The configuration of a run: what is computed, and how it is spread over a cluster.

A run is one YAML file or a packaged recipe. A wrong key or value raises a `ConfigError` of one line before anything
starts. Needs the standard library, pydantic and PyYAML.
"""

from datm_ray.config.files import (
    load_recipe_of_run as load_recipe_of_run,
    override as override,
    to_yaml as to_yaml,
    with_settings as with_settings,
)
from datm_ray.config.identity import (
    expert_fingerprint as expert_fingerprint,
    prior_fingerprint as prior_fingerprint,
    recipe_of_set as recipe_of_set,
    run_identity as run_identity,
    scoring_identity as scoring_identity,
    stable_hash as stable_hash,
    unread_keys as unread_keys,
    unread_values as unread_values,
)
from datm_ray.config.networks import (
    networks_named as networks_named,
    scored_on as scored_on,
    short_names as short_names,
)
from datm_ray.config.schema import (
    Role as Role,
    RunConfig as RunConfig,
    parse_config as parse_config,
)
from datm_ray.config.sections import (
    PUBLISHED_AUGMENTATION as PUBLISHED_AUGMENTATION,
    AuxiliaryExpertConfig as AuxiliaryExpertConfig,
    BackboneConfig as BackboneConfig,
    ClusterConfig as ClusterConfig,
    CurriculumConfig as CurriculumConfig,
    DatasetConfig as DatasetConfig,
    DistillConfig as DistillConfig,
    EvaluateConfig as EvaluateConfig,
    ExpertConfig as ExpertConfig,
    GivenConfig as GivenConfig,
    MetaConfig as MetaConfig,
    MetaLossConfig as MetaLossConfig,
    NetworkConfig as NetworkConfig,
    NetworkSpec as NetworkSpec,
    OptimiserName as OptimiserName,
    PriorConfig as PriorConfig,
    RecoverConfig as RecoverConfig,
    Section as Section,
    SelectConfig as SelectConfig,
    StartEpochs as StartEpochs,
    WorkerShape as WorkerShape,
    parse_bytes as parse_bytes,
)
