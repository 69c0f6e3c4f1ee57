"""Networks by name: a registry, and the ConvNet that the distillation literature is measured on.

A network maps images [b c h w] to logits [b k]. Further architectures join with `@register_network`.
Not covered here: parameters as one vector (`parameters.py`) and training (`training.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from datm_ray.core.instance_norm import InstanceNorm
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.errors import ConfigError

Norm = Literal["instance", "batch", "group", "none"]
Pooling = Literal["avg", "max", "none"]


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that decides a network's shape; two equal specs have interchangeable parameters."""

    architecture: str
    """Name in the registry."""
    channels: int
    """Input channels."""
    size: tuple[int, int]
    """Input height and width, pixels."""
    classes: int
    """Number of logits."""
    width: int = 128
    """Channels of every convolution (ConvNet)."""
    depth: int = 3
    """Number of convolution blocks (ConvNet)."""
    norm: Norm = "instance"
    """Normalisation after every convolution."""
    pooling: Pooling = "avg"
    """Pooling that ends every block, 2x2 with stride 2."""


Builder = Callable[[NetworkSpec], nn.Module]
_BUILDERS: dict[str, Builder] = {}


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
    """The network of `spec` with PyTorch's default initialisation, drawn from `seed` alone.

    Raises:
        ConfigError: unknown architecture, or an input too small for the depth.
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
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _normalisation(norm: Norm, width: int) -> nn.Module:
    if norm == "instance":
        return InstanceNorm(width)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, width), width)  # at most 32 groups, all of one size
    if norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.Identity()


def _pooling(pooling: Pooling) -> nn.Module:
    if pooling == "none":
        return nn.Identity()
    return nn.AvgPool2d(2) if pooling == "avg" else nn.MaxPool2d(2)


@register_network("convnet")
class ConvNet(nn.Module):
    """depth x [conv 3x3 -> norm -> ReLU -> pool 2x2], then one linear layer over the flattened map.

    The network of DC, DSA, MTT, FTD, TESLA and DATM: width 128, depth 3 at 32x32, 4 at 64x64, 5 at 128x128.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        height, width = spec.size
        shrink = 1 if spec.pooling == "none" else 2**spec.depth
        if min(height, width) < shrink:
            raise ConfigError(
                f"network.depth {spec.depth} halves a {height}x{width} image to nothing",
                remedy=f"use a depth of at most {min(height, width).bit_length() - 1}, or dataset.resize",
            )
        blocks: list[nn.Module] = []
        channels = spec.channels
        for _ in range(spec.depth):
            blocks += [
                nn.Conv2d(channels, spec.width, kernel_size=3, padding=1),
                _normalisation(spec.norm, spec.width),
                nn.ReLU(),
                _pooling(spec.pooling),
            ]
            channels = spec.width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(spec.width * (height // shrink) * (width // shrink), spec.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b k] of images [b c h w]."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
