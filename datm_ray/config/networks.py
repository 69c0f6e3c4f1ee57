"""Short names of a run's networks, for tables and for `--arch` on the command line.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from datm_ray.config.schema import RunConfig
from datm_ray.config.sections import PUBLISHED_WIDTH, NetworkConfig
from datm_ray.errors import ConfigError


def short_names(networks: Sequence[NetworkConfig]) -> list[str]:
    """Names of networks for tables, in the same order, such as "convnet" or "resnet18 (width 32)".

    Each name is the architecture, with its width if that is not the published one, and with the fields in which the
    given networks of this architecture differ.
    """

    def differing(network: NetworkConfig) -> Iterator[str]:
        alike = [each for each in networks if each.architecture == network.architecture]
        for field in NetworkConfig.model_fields:
            value = getattr(network, field)
            if any(getattr(each, field) != value for each in alike) or (field == "width" and value != PUBLISHED_WIDTH):
                yield f"{field} {value}"

    details = [", ".join(differing(network)) for network in networks]
    return [
        f"{network.architecture} ({detail})" if detail else network.architecture
        for network, detail in zip(networks, details, strict=True)
    ]


def scored_on(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Copy of the run whose `evaluate.networks` are the networks of these names, each NAME or NAME:WIDTH.

    Raises:
        ConfigError: a width is not a positive number.
    """
    evaluate = config.evaluate.model_copy(update={"networks": tuple(networks_named(config, names))})
    return config.model_copy(update={"evaluate": evaluate})


def networks_named(config: RunConfig, names: Sequence[str]) -> dict[NetworkConfig, str]:
    """Networks that the user asks for by names of architectures. Returns network -> its name in `names`.

    Args:
        names: each is NAME or NAME:WIDTH. NAME is an architecture, and means every network of this architecture in the
            recipe. If the recipe has no such network, NAME means the published network. NAME:WIDTH means the first
            network that NAME means, with another width. NAME may also be package.module:Builder: an identifier of
            Python after the colon is a Builder, any other text is a width.

    Raises:
        ConfigError: a width is not a positive number.
    """
    own = [config.network, *(backbone.network for backbone in config.backbones)]
    own += config.metadd.auxiliaries if config.metadd else ()
    networks: dict[NetworkConfig, str] = {}
    for name in map(str.strip, names):
        architecture, width = _architecture_and_width(name)
        found = [each for each in own if each.architecture == architecture] or [
            NetworkConfig(architecture=architecture)
        ]
        if width:
            found = [found[0].model_copy(update={"width": int(width)})]
        for each in found:
            networks.setdefault(each, name)
    return networks


def _architecture_and_width(name: str) -> tuple[str, str]:
    """Divide NAME:WIDTH; the width is "" if there is none, as in package.module:Builder.

    Raises:
        ConfigError: the width is not a positive number.
    """
    architecture, colon, width = name.rpartition(":")
    if not colon or width.isidentifier():
        return name, ""
    if not (width.isdecimal() and int(width)):
        raise ConfigError(
            f"--arch {name!r} has no number after the colon",
            remedy="write NAME:WIDTH, as resnet18:32, or package.module:Builder",
        )
    return architecture, width
