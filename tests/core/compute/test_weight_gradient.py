"""Tests that the weight gradient with fewer multiplications equals the library's."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv2d

from datm_ray.core.compute.weight_gradient import LEAST_CHANNELS, QuickWeightGradients, weight_gradient

ATEN = torch.ops.aten


@pytest.mark.parametrize("shape", [(3, 5, 8, 6), (1, 1, 2, 2), (2, 4, 16, 16)])
def test_equals_automatic_differentiation(shape: tuple[int, int, int, int]) -> None:
    """The weight gradient equals autograd's to 1e-12, for unequal channels and unequal sides."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    weight = torch.randn(7, shape[1], 3, 3, generator=draw, dtype=torch.float64).requires_grad_()
    y = conv2d(x, weight, padding=1)
    y_ = torch.randn(y.shape, generator=draw, dtype=torch.float64)
    (expected,) = torch.autograd.grad(y, weight, y_)
    torch.testing.assert_close(weight_gradient(x, y_), expected, rtol=1e-12, atol=1e-12)


def test_float32_error_is_that_of_the_library() -> None:
    """The float32 error against float64 is at most 1.5 times the library's, at a real network's channels."""
    draw = torch.Generator().manual_seed(0)
    x, y_ = (torch.randn(20, 128, 16, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    exact = weight_gradient(x, y_)
    weight = torch.zeros(128, 128, 3, 3, requires_grad=True)
    (library,) = torch.autograd.grad(conv2d(x.float(), weight, padding=1), weight, y_.float())
    errors = [float((value.double() - exact).norm()) for value in (weight_gradient(x.float(), y_.float()), library)]
    assert errors[0] < 1.5 * errors[1]


def derivatives(channels: int, side: int = 4, **settings: int) -> tuple[torch.fx.GraphModule, tuple[torch.Tensor, ...]]:
    """The graph of a convolution's derivatives in input, weight and bias, and arguments for it."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, side, side, generator=draw, dtype=torch.float64)
    weight = torch.randn(channels, channels, 3, 3, generator=draw, dtype=torch.float64)
    settings = {"padding": 1} | settings
    y_ = torch.randn_like(conv2d(x, weight, **settings))

    def backward(y_: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pair = [[settings.get(name, 1)] * 2 for name in ("stride", "padding", "dilation")]
        result: tuple[torch.Tensor, ...] = ATEN.convolution_backward(
            y_, x, weight, [channels], *pair, False, [0, 0], 1, [True, True, True]
        )
        return result

    arguments = (y_, x, weight)
    return make_fx(backward)(*arguments), arguments


def test_a_graph_with_the_weight_gradient_gives_equal_derivatives() -> None:
    """A rewritten graph gives equal derivatives, and asks the library only for the one in the input."""
    graph, arguments = derivatives(LEAST_CHANNELS)
    quick = make_fx(lambda *inputs: QuickWeightGradients(graph).run(*inputs))(*arguments)
    for value, expected in zip(quick(*arguments), graph(*arguments), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    (left,) = (node for node in quick.graph.nodes if node.target is ATEN.convolution_backward.default)
    assert left.args[-1] == [True, False, False]


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (LEAST_CHANNELS - 1, {}),
        (LEAST_CHANNELS, {"side": 5}),
        (LEAST_CHANNELS, {"stride": 2}),
        (LEAST_CHANNELS, {"padding": 2, "dilation": 2}),
    ],
    ids=["few channels", "odd side", "stride", "dilation"],
)
def test_other_convolutions_are_left_alone(channels: int, settings: dict[str, int]) -> None:
    """Convolutions for which the method is slower or wrong keep the library's gradient."""
    graph, arguments = derivatives(channels, **settings)
    same = make_fx(lambda *inputs: QuickWeightGradients(graph).run(*inputs))(*arguments)
    for value, expected in zip(same(*arguments), graph(*arguments), strict=True):
        assert torch.equal(value, expected)
    (left,) = (node for node in same.graph.nodes if node.target is ATEN.convolution_backward.default)
    assert left.args[-1] == [True, True, True]
