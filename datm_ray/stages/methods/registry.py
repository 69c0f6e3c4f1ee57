"""Methods by name. A method's module is imported only when a run uses it."""

from __future__ import annotations

from datm_ray.config import RunConfig, expert_fingerprint
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
    """Number of iterations of a run's distillation; `distill.iterations` if the method cannot be imported here."""
    try:
        return method_of(config).iterations(config)
    except ConfigError:
        return config.distill.iterations


def trained_backbones(config: RunConfig) -> list[RunConfig]:
    """Backbones whose experts a run's method needs, in the recipe's order, each as a run with that network alone."""
    return method_of(config).trained_backbones(config)


def teacher_of(config: RunConfig) -> RunConfig:
    """Network whose expert 0 is the teacher of `evaluate.labels`, as a run with this network alone.

    The network is that of `evaluate.teacher` or, without this key, the first trained backbone.

    Raises:
        ConfigError: the run trains no backbone and has no teacher of its own.
    """
    trained = [*config.own_teacher(), *trained_backbones(config)]
    if not trained:
        raise ConfigError(
            f"evaluate.labels is {config.evaluate.labels!r}, and method {config.method} trains no network that could "
            "be the teacher",
            remedy="use --set evaluate.labels=own, or give a teacher, such as --set evaluate.teacher.network=resnet18",
        )
    return trained[0]


def role_of(config: RunConfig, network: RunConfig) -> str:
    """Role of one of a run's `trained_networks` in lists of costs: "teacher", "auxiliaries" (of MetaDD) or "experts".

    A teacher is a single trained network: that of `evaluate.teacher`, or the one from which the method makes the set.

    Args:
        network: the trained network, as a run with this network alone.
    """
    wanted = expert_fingerprint(network, "")

    def is_among(networks: list[RunConfig]) -> bool:
        return any(expert_fingerprint(each, "") == wanted for each in networks)

    teachers = config.own_teacher() + (trained_backbones(config) if method_of(config).has_teacher else [])
    if network.experts.count == 1 and is_among(teachers):
        return "teacher"
    return "auxiliaries" if is_among(config.each_auxiliary()) and not is_among(trained_backbones(config)) else "experts"


def networks_before_scoring(config: RunConfig) -> list[RunConfig]:
    """Networks that must be trained before a set is scored: backbones, then the teacher of `evaluate.teacher` if any.

    Each network is given as a run with this network alone.
    """
    return _with_teacher(config, trained_backbones(config))


def trained_networks(config: RunConfig) -> list[RunConfig]:
    """Networks that must be trained for a run: backbones, auxiliaries, then the teacher of `evaluate.teacher` if any.

    Each network is given as a run with this network alone.
    """
    return _with_teacher(config, [*trained_backbones(config), *config.each_auxiliary()])


def _with_teacher(config: RunConfig, networks: list[RunConfig]) -> list[RunConfig]:
    """Add the network of `evaluate.teacher`, if there is one, unless one of `networks` has the same experts."""
    for teacher in config.own_teacher():
        if all(expert_fingerprint(each, "") != expert_fingerprint(teacher, "") for each in networks):
            return [*networks, teacher]
    return networks
