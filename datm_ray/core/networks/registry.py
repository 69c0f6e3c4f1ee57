"""Networks by name: a registry, parameters from a seed, and feature maps of any network.

A network maps images [b c h w] to logits [b k]. A recipe may name a builder of a user's module as
`package.module:Builder`, and `@register_network` gives builders short names within one process. The architectures are
in `architectures.py`, parameters as one vector in `parameters.py`, training in `core/training`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from datm_ray.config import NetworkSpec
from datm_ray.config.plugins import imported
from datm_ray.core.compute.torch_compat import BatchNorm
from datm_ray.core.networks import architectures
from datm_ray.core.networks.architectures import SpatialNetwork
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.errors import ConfigError
from datm_ray.words import dimensions

Builder = Callable[[NetworkSpec], nn.Module]
_BUILDERS: dict[str, Builder] = {
    "alexnet": architectures.alexnet,
    "convnet": architectures.ConvNet,
    "lenet": architectures.lenet,
    "mlp": architectures.mlp,
    "mobilenet-v2": architectures.mobilenet_v2,
    "resnet18": partial(architectures.resnet, blocks=(2, 2, 2, 2), block=architectures.two_convolutions),
    "resnet50": partial(architectures.resnet, blocks=(3, 4, 6, 3), block=architectures.bottleneck),
    "resnet101": partial(architectures.resnet, blocks=(3, 4, 23, 3), block=architectures.bottleneck),
    "vgg11": architectures.vgg11,
    "vit-small": architectures.vit_small,
}


def register_network(name: str) -> Callable[[Builder], Builder]:
    """Return a decorator that registers a class or function as the builder of the architecture `name`.

    The builder takes a `NetworkSpec` and returns a module. It replaces an earlier builder of this name, in this process
    only.
    """

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


def network_names() -> list[str]:
    """Names of the registered architectures, sorted."""
    return sorted(_BUILDERS)


def build_network(spec: NetworkSpec, seed: int) -> nn.Module:
    """Build the network of `spec` with its architecture's initialisation, drawn from `seed` alone.

    Raises:
        ConfigError: the architecture is unknown or cannot be imported, or does not support the image size or the
            normalisation; or a user's builder fails or returns no module.
    """
    builder = _builder_of(spec.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Purpose.INITIAL_PARAMETERS))
        return builder(spec) if spec.architecture in _BUILDERS else _built(builder, spec)


def _builder_of(architecture: str) -> Builder:
    if architecture in _BUILDERS:
        return _BUILDERS[architecture]
    module, colon, _ = architecture.partition(":")
    if not colon:
        raise ConfigError(
            f"network.architecture is {architecture!r}, which is not registered",
            remedy=f"choose one of: {', '.join(network_names())}, or give package.module:Builder of your own",
        )
    try:
        found: Builder = imported("network.architecture", architecture)
    except ConfigError:
        if module not in _BUILDERS:
            raise
        raise ConfigError(
            f"network.architecture is {architecture!r}, and what follows the colon is no width",
            remedy=f"write NAME:WIDTH, as {module}:32, for --arch; in a recipe, the width is a key of its own",
        ) from None
    if not callable(found):
        raise ConfigError(
            f"network.architecture {architecture!r} is no builder",
            f"it is a {type(found).__name__}",
            "give a class or function that takes a datm_ray.config.NetworkSpec and returns a torch.nn.Module",
        )
    return found


def _built(builder: Builder, spec: NetworkSpec) -> nn.Module:
    """Call a user's builder. Returns its network, whose lazy layers have got their shapes.

    Raises:
        ConfigError: the builder raises an error, returns no module, or its network fails on an image of the spec.
    """
    try:
        network = builder(spec)
        if isinstance(network, nn.Module) and any(map(is_lazy, network.parameters())):
            with torch.no_grad():
                network.eval()(torch.zeros(1, spec.channels, *spec.size))  # lazy layers take their shapes
            network.train()
    except ConfigError:
        raise
    except Exception as failure:  # a user's builder may raise anything
        size = dimensions((spec.channels, *spec.size))
        raise ConfigError(
            f"network.architecture {spec.architecture!r} cannot be built for images of {size} in {spec.classes} "
            f"classes: {failure or type(failure).__name__}",
            remedy="mend the builder; DATM_RAY_DEBUG=1 shows where it failed",
        ) from failure
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"network.architecture {spec.architecture!r} returns a {type(network).__name__}",
            remedy="return a torch.nn.Module",
        )
    return network


def require_logits(network: nn.Module, spec: NetworkSpec) -> None:
    """Raise a `ConfigError` if a user's network, tried on two images, does not give the logits [b k] of its spec."""
    images, training = torch.zeros(2, spec.channels, *spec.size), network.training
    try:
        with torch.no_grad():
            logits = network.eval()(images)
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    except Exception as failure:  # a user's network may raise anything
        found = f"{type(failure).__name__}: {failure}"
    finally:
        network.train(training)
    if found != [2, spec.classes]:
        raise ConfigError(
            f"network.architecture {spec.architecture!r} gives {found} for images {list(images.shape)}",
            f"logits {[2, spec.classes]} are expected",
            "make the builder follow channels, size and classes of its spec",
        )


def require_stated_norm(network: nn.Module, spec: NetworkSpec) -> None:
    """Raise a `ConfigError` if a user's network does not match the key `network.norm`.

    The key must be "batch" if the network has batch normalisation, and must have another value if it has none. Methods
    read the key to decide what they can do.
    """
    if couples_samples(network) != (spec.norm == "batch"):
        has, norm = ("has", "batch") if couples_samples(network) else ("has no", "none")
        raise ConfigError(
            f"network.architecture {spec.architecture!r} {has} batch normalisation, and network.norm is {spec.norm!r}",
            "methods decide by network.norm what they can do",
            f"use network.norm={norm}, or make the builder follow spec.norm",
        )


def couples_samples(network: nn.Module) -> bool:
    """True if, in training mode, an image's output depends on the other images of its batch (batch statistics)."""
    return any(isinstance(module, BatchNorm) for module in network.modules())


def spatial_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the last feature maps [b c h w] before pooling, and the logits [b k] of images [b c h w].

    The logits are computed from the maps. So one call of `torch.autograd.grad` differentiates the logits with respect
    to the maps. Class activation maps use this derivative as weights. A transformer's maps are its tokens, each at its
    patch's position. A convolutional network that is no `SpatialNetwork`, such as torchvision's, is run, and the maps
    are the last output of a submodule that has more than one position.

    Raises:
        ConfigError: the network has no feature maps, such as an mlp, or they cannot be found, as in a transformer that
            is no `SpatialNetwork`.
    """
    if isinstance(network, SpatialNetwork):
        maps: Tensor = network.features(images)
        return maps, network.logits(maps)
    found = [] if _has_attention(network) else _maps_and_logits(network, images)
    if len(found) < 2:
        raise ConfigError(
            f"{type(network).__name__} has no feature maps",
            "it flattens its images at once, as mlp does, or is a transformer, whose maps cannot be found",
            "choose another architecture, such as convnet, or wrap it in SpatialNetwork(features, pooling, classifier)",
        )
    return found[-2], found[-1]


def embedding(network: nn.Module, images: Tensor) -> Tensor:
    """Compute a network's embedding [b d] of images [b c h w]: the input of its classifier.

    The classifier of an mlp, and of any other `nn.Sequential`, is its last layer.

    Raises:
        ConfigError: the network is neither a `SpatialNetwork` nor an `nn.Sequential` of several layers.
    """
    if isinstance(network, SpatialNetwork):
        return network.embedding(images)
    if isinstance(network, nn.Sequential) and len(network) > 1:
        hidden: Tensor = network[:-1](images)
        return hidden.flatten(1)
    raise ConfigError(
        f"{type(network).__name__} does not show where its classifier begins",
        "it was registered without being a SpatialNetwork or an nn.Sequential",
        "wrap it in SpatialNetwork(features, pooling, classifier), or choose another network.architecture",
    )


def require_maps(network: nn.Module, spec: NetworkSpec) -> None:
    """Raise a `ConfigError` if a network, tried on an image of its spec, has no feature maps, such as an mlp."""
    training = network.training
    try:
        with torch.no_grad():
            spatial_features(network.eval(), torch.zeros(1, spec.channels, *spec.size))
    except ConfigError as failure:
        raise ConfigError("network.architecture has no feature maps", failure.cause, failure.remedy) from None
    finally:
        network.train(training)


def _has_attention(network: nn.Module) -> bool:
    return any("attention" in type(part).__name__.lower() for part in network.modules())


def _maps_and_logits(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Run the network. Returns the outputs of its submodules that are feature maps, in order, then the logits.

    Feature maps are [b c h w] with more than one position. Outputs before the first convolution, and outputs of
    adaptive pooling, do not count.
    """
    found: list[Tensor] = []
    convolved = False

    def keep(part: nn.Module, _: object, output: object) -> None:
        nonlocal convolved
        convolved = convolved or isinstance(part, nn.Conv2d)
        # Outputs of adaptive pooling are left out, because adaptive pooling may enlarge a map of one position.
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
