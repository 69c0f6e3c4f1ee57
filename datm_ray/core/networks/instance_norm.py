"""Instance normalisation with hand-written first and second derivatives.

The literature's "instancenorm" is a group normalisation with one group per channel. Trajectory matching differentiates
it three times: along a direction (tangent), backwards, and backwards through the tangent. Automatic differentiation of
mean and variance takes about ten passes over the largest maps of the network. A hand-written derivative needs two
passes: one for its sums and one for its result. In a compiled student step, normalisation, activation and pooling take
7 ms instead of 20 in the forward pass, and 18 ms instead of 43 in its derivatives (benchmarks/LOG.md).

Notation, per image and channel with means over its map: h = (z - mean z) r with r = (var z + eps)^-1/2, y = g h + b.
Along a direction (zt, gt, bt): ht = r (zt - mean zt - h mean(zt h)). A trailing underscore is the cotangent of a value.
Shapes: z [n c i j] for n images, c channels and maps of i x j pixels; g and b [c].
Tests: tests/core/networks/test_instance_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm


class InstanceNorm(nn.GroupNorm):
    """Group normalisation with one group per channel, and a learned scale and shift.

    Attributes:
        explicit: True to use the derivatives of this module, which a compiler fuses well. False to use torch's own
            kernels, which are faster without a compiler. The values differ by rounding only.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.explicit = False

    def forward(self, images: Tensor) -> Tensor:
        """Normalise each map of i x j pixels in [n c i j] to mean 0 and variance 1, then scale and shift it."""
        return instance_norm(images, self.weight, self.bias, self.eps, explicit=self.explicit)


def set_explicit(network: nn.Module, explicit: bool) -> None:
    """Switch a network's instance normalisations to hand-written derivatives or, if not `explicit`, torch's kernels."""
    for part in network.modules():
        if isinstance(part, InstanceNorm):
            part.explicit = explicit


def instance_norm(images: Tensor, weight: Tensor, bias: Tensor, eps: float, *, explicit: bool) -> Tensor:
    """Normalise maps to mean 0 and variance 1 per image and channel, then scale and shift them.

    Args:
        images: [n c i j] a map of i x j pixels for each of n images and c channels.
        weight, bias: [c] scale and shift of each channel.
        eps: number added to the variance before the division.
        explicit: True to use hand-written derivatives, False to use torch's kernels. The values differ by rounding.
    """
    if not explicit:
        return group_norm(images, len(weight), weight, bias, eps)
    wide = torch.promote_types(images.dtype, torch.float32)  # bfloat16 is too coarse for sums over a map
    y: Tensor = _Norm.apply(images.to(wide), weight.to(wide), bias.to(wide), eps)
    return y.to(images.dtype)


def _mean(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3), keepdim=True)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise maps z [n c i j]. Returns the normalised maps h, and r [n c 1 1], each map's (var z + eps)^-1/2."""
    centred = z - _mean(z)
    r = torch.rsqrt(_mean(centred * centred) + eps)
    return centred * r, r


def _sum_over_images(means: Tensor, z: Tensor) -> Tensor:
    """Sum [c] of values [n c i j] over all images and pixels, computed from each map's mean alone.

    So the values themselves need not be read again.

    Args:
        means: [n c 1 1] mean of each map.
        z: [n c i j] tensor of the maps' shape; its values are not read.
    """
    return means.sum(dim=(0, 2, 3)) * (z.shape[2] * z.shape[3])


class _Norm(torch.autograd.Function):
    """Function y = g h + b, where h are the maps z normalised to mean 0 and variance 1, with hand-written derivatives.

    The maps are z [n c i j]. The scale g and the shift b are [c].
    """

    @staticmethod
    def forward(z: Tensor, g: Tensor, b: Tensor, eps: float) -> Tensor:
        h, _ = _normalise(z, eps)
        return h * _per_channel(g) + _per_channel(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, g, _, ctx.eps = inputs
        ctx.save_for_backward(z, g)
        ctx.save_for_forward(z, g)

    @staticmethod
    def backward(ctx: Any, y_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, g = ctx.saved_tensors
        h, r = _normalise(z, ctx.eps)
        mean_y_, mean_y_h = _mean(y_), _mean(y_ * h)
        z_ = (r * _per_channel(g)) * (y_ - mean_y_ - h * mean_y_h)
        return z_, _sum_over_images(mean_y_h, z), _sum_over_images(mean_y_, z), None

    @staticmethod
    def jvp(ctx: Any, zt: Tensor, gt: Tensor, bt: Tensor, _: None) -> Tensor:
        z, g = ctx.saved_tensors
        yt: Tensor = _NormTangent.apply(z, zt, g, gt, bt, ctx.eps)
        return yt


class _NormTangent(torch.autograd.Function):
    """Tangent yt = g ht + gt h + bt of y = g h + b along the direction (zt, gt, bt) of maps, scale and shift.

    h are the maps z normalised to mean 0 and variance 1, and ht is the tangent of h. The derivatives of yt are
    hand-written.
    """

    @staticmethod
    def forward(z: Tensor, zt: Tensor, g: Tensor, gt: Tensor, bt: Tensor, eps: float) -> Tensor:
        h, r = _normalise(z, eps)
        ht = r * (zt - _mean(zt) - h * _mean(zt * h))
        return ht * _per_channel(g) + h * _per_channel(gt) + _per_channel(bt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, zt, g, gt, _, ctx.eps = inputs
        ctx.save_for_backward(z, zt, g, gt)

    @staticmethod
    def backward(ctx: Any, yt_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        z, zt, g, gt = ctx.saved_tensors
        g, gt = _per_channel(g), _per_channel(gt)
        h, r = _normalise(z, ctx.eps)
        mean_zt, mean_zt_h = _mean(zt), _mean(zt * h)
        mean_yt_, mean_yt_h, mean_yt_zt = _mean(yt_), _mean(yt_ * h), _mean(yt_ * zt)
        mean_yt_ht = r * (mean_yt_zt - mean_zt * mean_yt_ - mean_zt_h * mean_yt_h)
        # ht is symmetric in zt and yt_: the same projection carries the cotangent back.
        zt_ = (r * g) * (yt_ - mean_yt_ - h * mean_yt_h)
        # The cotangent of h is along * yt_ + across * zt. It is carried back through the projection, and the derivative
        # of r adds a multiple of h.
        along, across = gt - r * mean_zt_h * g, -r * g * mean_yt_h
        mean_h_ = along * mean_yt_ + across * mean_zt
        mean_h_h = along * mean_yt_h + across * mean_zt_h
        z_ = r * (along * yt_ + across * zt - mean_h_ - h * (mean_h_h + g * mean_yt_ht))
        sums = (_sum_over_images(means, z) for means in (mean_yt_ht, mean_yt_h, mean_yt_))
        return z_, zt_, *sums, None
