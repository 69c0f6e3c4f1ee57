"""Bilinear sampling of images at affinely transformed positions, with a derivative whose sums have a fixed order.

On a GPU, the derivative of torch's `grid_sample` adds the gradients of a pixel in an order that differs from run to
run, so the last bits of the sum differ too. Under `torch.use_deterministic_algorithms`, which `cluster.deterministic`
sets, torch refuses to compute this derivative. This module then computes the derivative by products with interpolation
matrices, or by a scatter in a fixed order. The sampled images have the same bits either way. Shapes: b images, c h w
image. Tests: tests/core/images/test_resampling.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from datm_ray.core.compute.precision import tf32_products

MOST_SAMPLED = 65_535
"""Largest number of images in a call of `grid_sample`; cuDNN refuses more (github.com/pytorch/pytorch/issues/88380)."""


def resampled(images: Tensor, matrix: Tensor, *, align_corners: bool, is_turned: bool) -> Tensor:
    """Sample images [b c h w] bilinearly at affinely transformed positions; differentiable in the images.

    The result has the images' shape. Positions are (x, y), each from -1 to 1 within the image.

    Args:
        matrix: [b 2 3] times (x, y, 1) of a pixel of the result is the position (x, y) in the image that it shows.
        align_corners: True if -1 and 1 are the centres of the outermost pixels, with zeros beyond them. False if -1 and
            1 are the image's borders, with the outermost pixels repeated beyond them.
        is_turned: False if `matrix` is diagonal but for its last column, so that rows and columns are independent, and
            the derivative can be computed faster. True for any other matrix, such as a rotation.
    """
    grid = _grid(matrix, images.shape[2], images.shape[3], align_corners=align_corners)
    if torch.are_deterministic_algorithms_enabled() and images.requires_grad:
        read: Tensor = _InOrder.apply(images, grid, align_corners, is_turned)
        return read
    return _read(images, grid, align_corners=align_corners)


def _grid(matrix: Tensor, height: int, width: int, *, align_corners: bool) -> Tensor:
    """Positions [b h w 2] in the image from which each pixel of the result is read, as by torch's `affine_grid`.

    The last axis holds x, then y, each from -1 to 1 within the image. Sums of products compute both in a few kernels.
    `affine_grid` multiplies a matrix for each image instead, for which TF32 would have to be forbidden.

    Args:
        matrix: [b 2 3] a row for the x and a row for the y that are read. A row holds the factor of the result's x, the
            factor of the result's y, and a shift.
        height, width: size of the image and of the result in pixels.
        align_corners: True if -1 and 1 are the centres of the outermost pixels, False if they are the image's borders.
    """
    x = _centres(width, matrix, align_corners=align_corners)
    y = x if height == width else _centres(height, matrix, align_corners=align_corners)
    of_x, of_y, shift = matrix.unsqueeze(3).unbind(2)
    places = (of_x * x).unsqueeze(2) + (of_y * y + shift).unsqueeze(3)  # [b 2 h w]
    return places.permute(0, 2, 3, 1)


def _centres(side: int, like: Tensor, *, align_corners: bool) -> Tensor:
    """Coordinates [side] of the centres of `side` pixels, of the type and on the device of `like`.

    -1 and 1 are the outermost centres or, without `align_corners`, the image's borders.
    """
    last = float(side > 1) if align_corners else (side - 1) / side
    return torch.linspace(-last, last, side, dtype=like.dtype, device=like.device)


def _read(images: Tensor, grid: Tensor, *, align_corners: bool) -> Tensor:
    if len(images) > MOST_SAMPLED:
        parts = zip(images.split(MOST_SAMPLED), grid.split(MOST_SAMPLED), strict=True)
        return torch.cat([_read(*part, align_corners=align_corners) for part in parts])
    padding = "zeros" if align_corners else "border"
    return grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=align_corners)


class _InOrder(torch.autograd.Function):
    """Bilinear sampling as `grid_sample` does it, with a derivative for the images whose sums have a fixed order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor, align_corners: bool, is_turned: bool) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.settings = align_corners, is_turned
        return _read(images, grid, align_corners=align_corners)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        (grid,), (align_corners, is_turned) = ctx.saved_tensors, ctx.settings
        height, width = along[0].shape[2:]
        x = _places(grid[..., 0], width, align_corners=align_corners)
        y = _places(grid[..., 1], height, align_corners=align_corners)
        spread = _scattered if is_turned else _multiplied
        return spread(along[0], x, y), None, None, None


def _places(coordinates: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Turn coordinates into positions in pixels; 0 and side - 1 are the centres of the outermost pixels.

    Args:
        coordinates: horizontal or vertical coordinates, from -1 to 1 within the image.
        align_corners: True if -1 and 1 are the centres of the outermost pixels. False if -1 and 1 are the image's
            borders; positions beyond the outermost centres are then moved to the nearest centre.
    """
    if align_corners:
        return (coordinates + 1) / 2 * (side - 1)
    return (((coordinates + 1) * side - 1) / 2).clamp(0, side - 1)


def _multiplied(along: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient [b c h w] with respect to the sampled images, computed by two matrix products.

    The horizontal position must depend on the column alone, and the vertical one on the row alone.

    Args:
        along: [b c h w] gradient with respect to the result of the sampling.
        x, y: [b h w] horizontal and vertical positions that were read, in pixels.
    """
    columns, rows = _interpolation(x[:, 0]), _interpolation(y[:, :, 0])
    with tf32_products(False, along.device):
        return rows.mT[:, None] @ along @ columns[:, None]


def _interpolation(places: Tensor) -> Tensor:
    """Weights [b side side] of interpolation along a line of pixels: entry [., i, j] is pixel j's weight in value i.

    Args:
        places: [b side] positions, in pixels, at which the values are read.
    """
    distance = places[:, :, None] - torch.arange(places.shape[1], device=places.device)
    return (1 - distance.abs()).clamp(min=0)


def _scattered(along: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient [b c h w] with respect to the sampled images, for any positions.

    Each value was interpolated from four pixels, so its gradient is spread over these four pixels.

    Args:
        along: [b c h w] gradient with respect to the result of the sampling.
        x, y: [b h w] horizontal and vertical positions that were read, in pixels.
    """
    height, width = along.shape[2:]
    left, top = x.floor(), y.floor()
    indices, weights = [], []
    for near_y, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for near_x, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
            place = near_y.clamp(0, height - 1) * width + near_x.clamp(0, width - 1)
            indices.append(place.long())
            weights.append(weight_y * weight_x * inside)
    index, weight = (torch.stack(each, dim=1)[:, None] for each in (indices, weights))  # [b 1 4 h w]
    parts = along[:, :, None] * weight
    total = along.new_zeros(along.shape).flatten(2)
    return total.scatter_add(2, index.expand_as(parts).flatten(2), parts.flatten(2)).view_as(along)
