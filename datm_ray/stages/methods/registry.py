"""Methods by name. A method's module is imported only when a run uses it."""

from __future__ import annotations

from datm_ray.config import RunConfig
from datm_ray.config.plugins import imported
from datm_ray.errors import ConfigError
from datm_ray.stages.methods.base import Method

METHODS = {
    "datm": "datm_ray.stages.methods.trajectory:TrajectoryMatching",
    "mtt": "datm_ray.stages.methods.trajectory:MatchingTrainingTrajectories",
    "dm": "datm_ray.stages.methods.distribution:DistributionMatching",
    "sre2l": "datm_ray.stages.methods.recovery:RecoveryFromTeacher",
    "select": "datm_ray.stages.methods.selection:Selection",
    "given": "datm_ray.stages.methods.given:Given",
}
"""Name of each packaged method -> module and class."""


def method_of(config: RunConfig) -> type[Method]:
    """Class of a run's method: a packaged one, or a user's class given as `package.module:Class`.

    Raises:
        ConfigError: there is no such method, or it cannot be imported.
    """
    name = config.method
    place = METHODS.get(name, name)
    if ":" not in place:
        raise ConfigError(
            f"method is {name!r}, which does not exist",
            remedy=f"choose one of {', '.join(METHODS)}, or give package.module:Class of your own",
        )
    found = imported("method", place)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method {name!r} is no subclass of datm_ray.Method", remedy="derive the class from it")
    return found


def iterations_of(config: RunConfig) -> int:
    """Number of iterations of a run's distillation; the recipe's number if the method cannot be imported here."""
    try:
        return method_of(config).iterations(config)
    except ConfigError:
        return config.distill.iterations


def trained_backbones(config: RunConfig) -> list[RunConfig]:
    """Backbones whose experts a run's method needs, in the recipe's order, each as a run with that network alone."""
    return method_of(config).trained_backbones(config)


def teacher_of(config: RunConfig) -> RunConfig:
    """First trained backbone, as a run with this network alone. Its expert 0 is the teacher of `evaluate.labels`.

    Raises:
        ConfigError: the run trains no backbone.
    """
    trained = trained_backbones(config)
    if not trained:
        raise ConfigError(
            f"evaluate.labels is {config.evaluate.labels!r}, and method {config.method} trains no network that could "
            "be the teacher",
            "use --set evaluate.labels=own",
        )
    return trained[0]


def trained_networks(config: RunConfig) -> list[RunConfig]:
    """Networks that must be trained before a distillation, each as a run with it alone: backbones, then auxiliaries."""
    return [*trained_backbones(config), *config.each_auxiliary()]
