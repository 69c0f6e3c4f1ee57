"""Networks by name: a registry, parameters from a seed, and what one may ask of any network.

A network maps images [b c h w] to logits [b k]. Further architectures join with `@register_network`.
Not covered here: the architectures themselves (`architectures.py`), parameters as one vector (`parameters.py`) and
training (`training.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from datm_ray.core.architectures import (
    ConvNet,
    NetworkSpec,
    Norm,
    Pooling,
    SpatialNetwork,
    alexnet,
    lenet,
    mlp,
    resnet18,
    vgg11,
    vit_small,
)
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.torch_compat import BatchNorm
from datm_ray.errors import ConfigError

__all__ = [
    "Builder",
    "ConvNet",
    "NetworkSpec",
    "Norm",
    "Pooling",
    "SpatialNetwork",
    "build_network",
    "couples_samples",
    "network_names",
    "register_network",
    "require_maps",
    "spatial_features",
]

Builder = Callable[[NetworkSpec], nn.Module]
_BUILDERS: dict[str, Builder] = {
    "alexnet": alexnet,
    "convnet": ConvNet,
    "lenet": lenet,
    "mlp": mlp,
    "resnet18": resnet18,
    "vgg11": vgg11,
    "vit-small": vit_small,
}


def register_network(name: str) -> Callable[[Builder], Builder]:
    """Class or function decorator: make `name` a valid `NetworkSpec.architecture`."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


def network_names() -> list[str]:
    """The registered architectures, sorted."""
    return sorted(_BUILDERS)


def build_network(spec: NetworkSpec, seed: int) -> nn.Module:
    """The network of `spec` as its architecture initialises it, drawn from `seed` alone.

    Raises:
        ConfigError: unknown architecture, images too small for it, or a normalisation that it cannot have.
    """
    if spec.architecture not in _BUILDERS:
        raise ConfigError(
            f"network.architecture is {spec.architecture!r}, which is not registered",
            remedy=f"choose one of: {', '.join(network_names())}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Purpose.INITIAL_PARAMETERS))
        return _BUILDERS[spec.architecture](spec)


def couples_samples(network: nn.Module) -> bool:
    """Whether one sample's output in training mode depends on the others of its batch (batch statistics)."""
    return any(isinstance(module, BatchNorm) for module in network.modules())


def spatial_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last feature maps [b c h w], before they are pooled, and the logits [b k] of images [b c h w].

    The logits are computed from the maps, so their derivative in the maps, which class activation maps weight the maps
    with, is one call of `torch.autograd.grad`. A transformer's maps are its tokens, each where its patch was. Of a
    convolutional network that is no `SpatialNetwork`, torchvision's for instance, they are the last output of any of
    its modules that has more than one position.

    Raises:
        ConfigError: the network has no maps, as an mlp, or none that can be found.
    """
    if isinstance(network, SpatialNetwork):
        maps: Tensor = network.features(images)
        return maps, network.logits(maps)
    found = [] if _has_attention(network) else _maps_and_logits(network, images)
    if len(found) < 2:
        raise ConfigError(
            f"{type(network).__name__} has no feature maps to show",
            "it flattens its images at once, as mlp does, or is a transformer, whose maps only its author knows",
            "choose another architecture, such as convnet, or wrap it: SpatialNetwork(features, pooling, classifier)",
        )
    return found[-2], found[-1]


def require_maps(network: nn.Module) -> None:
    """Raise a `ConfigError` if a registered network has no feature maps to show."""
    if not isinstance(network, SpatialNetwork):
        raise ConfigError(
            "network.architecture has no feature maps to show",
            "it flattens its images at once, as mlp does, or was registered without being a SpatialNetwork",
            "choose another network.architecture, such as convnet",
        )


def _has_attention(network: nn.Module) -> bool:
    return any("attention" in type(part).__name__.lower() for part in network.modules())


def _maps_and_logits(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of the network's modules that have more than one position, then the logits."""
    found: list[Tensor] = []
    convolved = False

    def keep(part: nn.Module, _: object, output: object) -> None:
        nonlocal convolved
        convolved = convolved or isinstance(part, nn.Conv2d)
        # Adaptive pooling may blow a map of one position up.
        is_map = isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1
        if isinstance(output, Tensor) and is_map and convolved and not isinstance(part, nn.AdaptiveAvgPool2d):
            found.append(output)

    hooks = [part.register_forward_hook(keep) for part in network.modules() if part is not network]
    try:
        logits: Tensor = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, logits]
