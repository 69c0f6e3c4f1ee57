"""Several networks of one architecture as one network: feature maps side by side, a convolution group per network.

Under `torch.func.vmap` each layer between the convolutions would reorder the maps. Here the maps stay [b, s c, h, w].
Only chains of the layers in `_LAYERS` can be computed in this way: ConvNet, VGG, AlexNet, LeNet. Shapes: s networks, b
images, c h w an image or a map of one network, p parameters, q buffers, k classes.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import conv2d, group_norm, pad

from datm_ray.config import NetworkSpec
from datm_ray.core.compute.compilation import CompiledForShapes, compiler_problem
from datm_ray.core.compute.torch_compat import BatchNorm
from datm_ray.core.networks.architectures import GlobalAverage, SpatialNetwork
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.networks.instance_norm import InstanceNorm, instance_norm, set_explicit
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network, couples_samples

CACHED_MAP_BYTES = 10 * 2**20
"""Largest size in bytes, inclusive, of a call's largest feature map on a CPU, for all its networks and images: the map
then stays in the CPU's cache. Twenty images of 32x32 with 128 channels take as many bytes."""
STACKED_MAP_BYTES = 3 * 2**19
"""Largest size in bytes, inclusive, on a CPU, of the largest feature map of all experts that are trained together, for
a whole batch, unless `cluster.experts_at_a_time` gives the number of experts.

Up to this size the map fits the second-level cache. Measured with experts of digits at batch 32: six experts trained
together ran 1.9 times as fast as one at a time; eight, above this size, only 1.2 times."""
LARGEST_STACK = 8
"""Largest number of networks that are trained together, unless `cluster.experts_at_a_time` gives more for experts."""

_LAYERS = (nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Identity, nn.Sequential, GlobalAverage)


def can_be_stacked(network: nn.Module) -> bool:
    """True if several networks of this architecture can be computed side by side, as one network.

    This needs a `SpatialNetwork` whose features and pooling are chains of the layers in `_LAYERS` and of instance
    normalisations, and whose classifier has only linear layers and ReLU.
    """
    if not isinstance(network, SpatialNetwork):
        return False
    chain = [*network.features.modules(), *network.pooling.modules()]
    linear = (nn.Linear, nn.ReLU, nn.Sequential)
    return all(type(part) in (*_LAYERS, InstanceNorm) for part in chain) and all(
        type(part) in linear for part in network.classifier.modules()
    )


@functools.lru_cache(maxsize=64)
def cost_and_stacking(spec: NetworkSpec) -> tuple[ImageCost, bool]:
    """Cost of one image in a network of `spec`, and what `can_be_stacked` returns for such a network."""
    network = build_network(spec, seed=0)
    return image_cost(network, (spec.channels, *spec.size)), can_be_stacked(network)


def _logits(network: FlatNetwork, parameters: Tensor, images: Tensor) -> Tensor:
    """Logits [s b k] of s networks with parameters [s p] for their own images [s b c h w].

    Args:
        network: network for which `can_be_stacked` returns True.
    """
    module, size = network.module, len(parameters)
    assert isinstance(module, SpatialNetwork)
    pieces = zip(network.names, parameters.split(network.sizes, dim=1), network.shapes, strict=True)
    layers = {name: piece.reshape(size, *shape) for name, piece, shape in pieces}
    maps = images.transpose(0, 1).flatten(1, 2)  # [b, s c, h, w]
    for name in ("features", "pooling"):
        maps = _maps(getattr(module, name), name, layers, maps, size)
    vectors = maps.unflatten(1, (size, -1)).flatten(2).transpose(0, 1)
    return _vectors(module.classifier, "classifier", layers, vectors)


def _maps(layer: nn.Module, name: str, layers: dict[str, Tensor], maps: Tensor, size: int) -> Tensor:
    """Apply one layer, or a chain of layers, with the parameters in `layers` to the maps [b, s c, h, w] of s networks.

    Args:
        name: name of the layer in the network.
        layers: name of a parameter -> its values [s ..] in all networks.
        size: the number s.
    """
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
    """Apply one layer, or a chain of layers, with the parameters in `layers` to the vectors [s b d] of s networks.

    Args:
        name: name of the layer in the network.
        layers: name of a parameter -> its values [s ..] in all networks.
    """
    if isinstance(layer, nn.Sequential):
        for place, part in layer.named_children():
            vectors = _vectors(part, f"{name}.{place}", layers, vectors)
        return vectors
    if isinstance(layer, nn.Linear):
        return torch.baddbmm(layers[f"{name}.bias"][:, None], vectors, layers[f"{name}.weight"].transpose(1, 2))
    same: Tensor = layer(vectors)
    return same


StackResults = tuple[Tensor, Tensor, Tensor]
"""Losses [s], their gradients [s p], and buffers [s q] after a forward pass, of s networks in training."""


class StackFunctions:
    """Function that computes losses and gradients of s networks of one architecture, compiled if possible.

    Attributes:
        note: one line on why the function is not compiled although this was asked for; "" otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        stacked: int = 1,
        compile_: bool = True,
        channels_last: bool = True,
        in_bfloat16: bool = False,
    ) -> None:
        """Prepare the function for `stacked` networks with the architecture of `network`.

        Args:
            network: network whose structure and device are used, but not its parameters.
            stacked: number of networks that a call computes; single calls may compute fewer.
            compile_: True to compile if the machine can, and the network has no batch statistics.
            channels_last: True to keep maps with their channels innermost: faster on CPUs, with coarser rounding.
            in_bfloat16: True to compute layers in bfloat16 where torch's autocast does. Parameters, gradients and
                losses stay in the parameters' type.
        """
        self._in_bfloat16 = in_bfloat16
        self._channels_last = channels_last
        self.note = compiler_problem(next(network.parameters()).device.type) if compile_ else ""
        # Batch statistics are written in place, and a traced graph must not write in place.
        self._has_statistics = couples_samples(network)
        self._is_compiled = compile_ and not self.note and not self._has_statistics
        network = _without_counters(network)
        self._network, self._size = FlatNetwork(network), stacked
        self._is_stackable = can_be_stacked(network)
        set_explicit(network, self._is_compiled and (stacked == 1 or self._is_stackable))
        self._largest: dict[tuple[int, int, int], int] = {}
        """Shape of an image -> bytes of its largest map in the network."""
        self._function: Callable[..., tuple[Tensor, Tensor]] = (
            CompiledForShapes(self._all, channels_last=channels_last) if self._is_compiled else self._all
        )

    @property
    def fills_up(self) -> bool:
        """True if smaller batches should be filled up with images of weight 0, so that all batches have one size."""
        return self._is_compiled

    def __call__(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> StackResults:
        """Compute losses [s], their gradients [s p], and the buffers [s q] after the pass.

        A network's loss is the sum over its images of weight times cross-entropy.

        Args:
            parameters: [s p] flat parameters of each network.
            buffers: [s q] flat buffers of each network.
            images: [s b c h w] images of each network.
            labels: [s b] int64 classes, or [s b k] probabilities.
            weights: [b] weights of the images in every network's loss.
        """
        if self._has_statistics:
            return self._with_statistics(parameters, buffers, images, labels, weights)
        calls = math.ceil(len(weights) / self._in_cache(images))
        size = math.ceil(len(weights) / calls)
        missing = calls * size - len(weights)
        images, labels, weights = filled_up(images, labels, weights, missing)
        parts = [
            self._part(parameters, part, labels[:, first : first + size], weights[first : first + size])
            for first, part in zip(range(0, calls * size, size), images.split(size, dim=1), strict=True)
        ]
        losses, gradients = parts[0]
        for loss, gradient in parts[1:]:
            losses, gradients = losses + loss, gradients.add_(gradient)
        return losses, gradients, buffers

    def _in_cache(self, images: Tensor) -> int:
        """Number of images in one call: on a GPU all; on a CPU as many as keep the largest map within the cache."""
        if images.device.type != "cpu":
            return images.shape[1]
        image = (images.shape[2], images.shape[3], images.shape[4])
        if image not in self._largest:
            self._largest[image] = image_cost(self._network.module, image).largest
        return max(1, CACHED_MAP_BYTES // (self._size * self._largest[image]))

    def _part(self, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        # A group norm must keep the channels of its input innermost, which torch 2.11 cannot do under vmap.
        is_mapped = len(parameters) > 1 and not self._is_stackable
        innermost = self._channels_last and not is_mapped
        images, labels = _channels_innermost(images) if innermost else images.contiguous(), labels.contiguous()
        return self._function(parameters, images, labels, weights)

    def _all(self, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if len(parameters) == 1:
            loss, gradient = self._one(parameters[0], images[0], labels[0], weights)
            return loss[None], gradient[None]
        if self._is_stackable:
            return self._side_by_side(parameters, images, labels, weights)
        losses, gradients = vmap(self._one, in_dims=(0, 0, 0, None))(parameters, images, labels, weights)
        return losses, gradients

    def _side_by_side(
        self, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        def total(parameters: Tensor) -> tuple[Tensor, Tensor]:
            # No loss depends on another network's parameters, so the gradient of the sum is each loss's own gradient.
            with self._lowered(images):
                logits = _logits(self._network, parameters, images)
            losses = _losses(logits.to(parameters.dtype), labels, weights)
            return losses.sum(), losses

        gradients, losses = grad(total, has_aux=True)(parameters)
        return losses, gradients

    def _one(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        def loss_of(theta: Tensor) -> Tensor:
            with self._lowered(x):
                logits = self._network(theta, x)
            return _losses(logits.to(theta.dtype), y, weights)

        gradient, loss = grad_and_value(loss_of)(theta)
        return loss, gradient

    def _with_statistics(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        after, innermost = buffers.clone(), self._channels_last and _gains_from_order(images.device)
        losses, gradients = [], []
        for theta, own, x, y in zip(parameters, after, images, labels, strict=True):
            theta = theta.detach().requires_grad_()
            x = x.contiguous(memory_format=torch.channels_last) if innermost else x
            with self._lowered(x):
                logits = self._network.with_buffers(theta, own, x, channels_last=innermost)
            loss = _losses(logits.to(theta.dtype), y, weights)
            gradients.append(torch.autograd.grad(loss, theta)[0])
            losses.append(loss.detach())
        return torch.stack(losses), torch.stack(gradients), after

    def _lowered(self, images: Tensor) -> AbstractContextManager[Any]:
        """Context in which layers compute in bfloat16 if `in_bfloat16` was given; without effect otherwise."""
        if not self._in_bfloat16:
            return nullcontext()
        return torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False)  # a cache would leak into graphs


def _gains_from_order(device: torch.device) -> bool:
    """True for GPUs: networks with batch statistics are faster there if feature maps have their channels innermost.

    Otherwise cuDNN reorders the maps at every convolution, for the tensor cores. CPUs were not measured.
    """
    return device.type == "cuda"


def filled_up(images: Tensor, labels: Tensor, weights: Tensor, missing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append `missing` images of zeros, of weight 0, to every network's batch. Returns images, labels and weights.

    Args:
        images: [s b c h w] images of s networks.
        labels: [s b] classes or [s b k] probabilities.
        weights: [b] weights of the images in the loss.
    """
    if not missing:  # padding by nothing would copy
        return images, labels, weights
    added = (0, 0) * (labels.dim() - 2) + (0, missing)
    return pad(images, (0, 0) * 3 + (0, missing)), pad(labels, added), pad(weights, (0, missing))


def _channels_innermost(images: Tensor) -> Tensor:
    """Copy images [s b c h w] into the memory order [b h w s c].

    A stacked convolution has a group for each network and reads [b, s c, h, w]. With this memory order the convolution
    needs no copy, and on CPUs takes less than half the time (benchmarks/LOG.md).
    """
    return images.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


def _losses(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums [s] over images of the cross-entropy between logits [s b k] and labels [s b] or [s b k].

    The axis s may be left out for a single network. The result is then a scalar [].
    """
    logarithms = logits.log_softmax(dim=-1)
    if labels.is_floating_point():
        per_sample = -(labels * logarithms).sum(dim=-1)
    else:
        per_sample = -logarithms.gather(-1, labels[..., None])[..., 0]
    sums: Tensor = (weights * per_sample).sum(dim=-1)
    return sums


def _without_counters(network: nn.Module) -> nn.Module:
    """Copy a network without its batch normalisations' counters of batches, which no code here reads."""
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, BatchNorm):
            part.num_batches_tracked = None
    return network
