"""Weight gradients of 3x3 convolutions with fewer multiplications, for CPUs.

The gradient in the weights is itself a convolution, of the input with the output's cotangent, with a result of 3x3.
Winograd's minimal filtering computes this gradient from tiles of 2x2 cotangents and the 4x4 inputs around them, with 16
instead of 36 multiplications:

    dw = G' [ sum over tiles of (B' x B) * (A y_ A') ] G

The products of all channels become 16 matrix products. B, A and G are the matrices of F(2x2, 3x3), Lavin and Gray,
arXiv 1509.09308, applied here as sums of slices. The result is exact up to rounding, which is as in a direct
convolution. On two cores without AVX-512, torch's weight gradient runs at half the speed of torch's other convolutions.
For these other convolutions the same method gained nothing (benchmarks/LOG.md).

Shapes: x [b c h w] input, y_ [b o h w] cotangent, t tiles of the whole batch.
Tests: tests/core/compute/test_weight_gradient.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

LEAST_CHANNELS = 64
"""Smallest number of input and of output channels, inclusive, for which `weight_gradient` is used.

With fewer, the matrix products are too small to pay for the transforms."""

_ATEN = torch.ops.aten


def weight_gradient(x: Tensor, y_: Tensor) -> Tensor:
    """Compute the gradient with respect to the weights [o c 3 3] of a 3x3 convolution with padding 1, for even h and w.

    Args:
        x: [n c h w] input of the convolution.
        y_: [n o h w] gradient with respect to its output.
    """
    products = torch.bmm(_input_tiles(x).transpose(1, 2), _cotangent_tiles(y_))  # [16 c o]
    rows = [_from_four(*products[4 * i : 4 * i + 4].unbind()) for i in range(4)]
    columns = [_from_four(*(rows[i][j] for i in range(4))) for j in range(3)]
    stacked = torch.stack([torch.stack([columns[j][i] for j in range(3)]) for i in range(3)])  # [3 3 c o]
    return stacked.permute(3, 2, 0, 1)


class QuickWeightGradients(fx.Interpreter):
    """Interpreter that runs a graph with `weight_gradient` in place of torch's own, wherever that is possible."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one node of the graph, with `weight_gradient` if the node is a convolution derivative that allows it."""
        if target is _ATEN.convolution_backward.default and _applies(*args):
            y_, x, wants = args[0], args[1], args[-1]
            # torch computes the bias gradient only together with the weight gradient.
            inputs_only = (*args[:-1], [wants[0], False, False])
            x_ = super().call_function(target, inputs_only, kwargs)[0] if wants[0] else None
            return x_, weight_gradient(x, y_), y_.sum(dim=(0, 2, 3)) if wants[2] else None
        return super().call_function(target, args, kwargs)


def has_slow_weight_gradients(graph: fx.Graph) -> bool:
    """True if a traced graph has weight gradients that `QuickWeightGradients` would replace."""
    derivatives = [node.args for node in graph.nodes if node.target is _ATEN.convolution_backward.default]
    return any(_applies(*(fx.map_arg(each, lambda node: node.meta["val"]) for each in args)) for args in derivatives)


def _applies(
    y_: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _output_padding: list[int],
    groups: int,
    wants: list[bool],
) -> bool:
    """True if a convolution's derivative includes a weight gradient that `weight_gradient` computes faster."""
    plain = (list(stride), list(padding), list(dilation), transposed, groups) == ([1, 1], [1, 1], [1, 1], False, 1)
    sides = tuple(weight.shape[2:]) == (3, 3) and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    wide = min(weight.shape[:2]) >= LEAST_CHANNELS
    return bool(plain and sides and wide and wants[1] and x.device.type == "cpu" and y_.dtype == x.dtype)


@torch.library.custom_op("datm_ray::framed", mutates_args=())
def _framed(x: Tensor) -> Tensor:
    """Pad the input [b c h w] by one pixel of zeros on every side, with channels innermost: [b h+2 w+2 c].

    This is an operation of its own, so that the compiler writes the padded input once. Otherwise the compiler would
    compute every tile by masked reads, which is more work than the matrix products save.
    """
    return pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()


@_framed.register_fake
def _(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.new_empty(b, h + 2, w + 2, c)


def _input_tiles(x: Tensor) -> Tensor:
    """Winograd transform [16 t c] of the convolution's input: 16 numbers for each of t tiles and c channels.

    A tile is 2x2 outputs of the convolution. The 16 numbers are computed from the 4x4 inputs around the tile.
    """
    x = _framed(x)
    tiles = [part for row in _input_parts(x, 1) for part in _input_parts(row, 2)]
    return torch.stack(tiles).flatten(1, 3)


def _input_parts(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Winograd transform of padded inputs along one axis. Returns four sums or differences of two inputs each.

    Along this axis, each result has one entry for every tile. Tile i combines the inputs 2 i to 2 i + 3.
    """
    pairs = x.shape[axis] // 2
    x = x.unflatten(axis, (pairs, 2))
    here, after = x.narrow(axis, 0, pairs - 1), x.narrow(axis, 1, pairs - 1)
    d0, d1 = here.unbind(axis + 1)
    d2, d3 = after.unbind(axis + 1)
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _cotangent_tiles(y_: Tensor) -> Tensor:
    """Winograd transform [16 t o] of cotangents: 16 numbers for each tile of 2x2 cotangents and each channel."""
    b, o, h, w = y_.shape
    y_ = y_.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, o)
    tiles = [part for row in _cotangent_parts(*y_.unbind(2)) for part in _cotangent_parts(*row.unbind(3))]
    return torch.stack(tiles).flatten(1, 3)


def _cotangent_parts(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return first, first + second, first - second, -second


def _from_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse Winograd transform along one axis: gradients with respect to three weights from four products."""
    half_sum = (b + c) / 2
    return a + half_sum, (b - c) / 2, half_sum + d
