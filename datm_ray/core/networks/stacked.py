"""Several networks of one kind as one network: feature maps side by side, convolutions with a group per network.

Under `torch.func.vmap` each layer between the convolutions would reorder the maps; here they stay [b, s c, h, w]. Only
chains of the layers in `_LAYERS` can be stacked: ConvNet, VGG, AlexNet, LeNet. Shapes: s networks, b images, c h w an
image or a map of one network, p parameters, k classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm

from datm_ray.core.networks.architectures import GlobalAverage, SpatialNetwork
from datm_ray.core.networks.instance_norm import InstanceNorm, instance_norm
from datm_ray.core.networks.parameters import FlatNetwork

_LAYERS = (nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Identity, nn.Sequential, GlobalAverage)


def can_be_stacked(network: nn.Module) -> bool:
    """True if the network is a chain of layers that have a stacked form, with linear layers at its end."""
    if not isinstance(network, SpatialNetwork):
        return False
    chain = [*network.features.modules(), *network.pooling.modules()]
    linear = (nn.Linear, nn.ReLU, nn.Sequential)
    return all(type(part) in (*_LAYERS, InstanceNorm) for part in chain) and all(
        type(part) in linear for part in network.classifier.modules()
    )


class StackedNetwork:
    """Function that computes logits [s b k] of s networks with parameters [s p] on their own images [s b c h w]."""

    def __init__(self, network: FlatNetwork) -> None:
        self._network = network

    def __call__(self, parameters: Tensor, images: Tensor) -> Tensor:
        network = self._network.module
        assert isinstance(network, SpatialNetwork)
        size = len(parameters)
        layers = {
            name: piece.reshape(size, *shape)
            for name, piece, shape in zip(
                self._network.names, parameters.split(self._network.sizes, dim=1), self._network.shapes, strict=True
            )
        }
        maps = images.transpose(0, 1).flatten(1, 2)  # [b, s c, h, w]
        for name in ("features", "pooling"):
            maps = _maps(getattr(network, name), name, layers, maps, size)
        return _vectors(
            network.classifier, "classifier", layers, maps.unflatten(1, (size, -1)).flatten(2).transpose(0, 1)
        )


def _maps(layer: nn.Module, name: str, layers: dict[str, Tensor], maps: Tensor, size: int) -> Tensor:
    """Apply one layer to the maps [b, s c, h, w] of all networks."""
    if isinstance(layer, nn.Sequential):
        for place, part in layer.named_children():
            maps = _maps(part, f"{name}.{place}", layers, maps, size)
        return maps
    if not list(layer.parameters()):
        same: Tensor = layer(maps)
        return same
    weight = layers[f"{name}.weight"].flatten(0, 1)
    bias = layers[f"{name}.bias"].flatten(0, 1) if f"{name}.bias" in layers else None
    if isinstance(layer, nn.Conv2d):
        assert isinstance(layer.padding, tuple)
        return conv2d(maps, weight, bias, layer.stride, layer.padding, layer.dilation, size * layer.groups)
    assert isinstance(layer, nn.GroupNorm)
    assert bias is not None
    if isinstance(layer, InstanceNorm):
        return instance_norm(maps, weight, bias, layer.eps, explicit=layer.explicit)
    return group_norm(maps, size * layer.num_groups, weight, bias, layer.eps)


def _vectors(layer: nn.Module, name: str, layers: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """Apply one layer to the vectors [s b d] of all networks."""
    if isinstance(layer, nn.Sequential):
        for place, part in layer.named_children():
            vectors = _vectors(part, f"{name}.{place}", layers, vectors)
        return vectors
    if isinstance(layer, nn.Linear):
        return torch.baddbmm(layers[f"{name}.bias"][:, None], vectors, layers[f"{name}.weight"].transpose(1, 2))
    same: Tensor = layer(vectors)
    return same
