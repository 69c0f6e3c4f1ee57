"""Tests every derivative of the written-out instance normalisation against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp

from datm_ray.core.networks.instance_norm import InstanceNorm

WIDTH = 3
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def normalise(explicit: bool) -> Function:
    """y(z, g, b) by the module, with its own derivatives or with torch's."""
    module = InstanceNorm(WIDTH)
    module.explicit = explicit
    return lambda z, g, b: functional_call(module, {"weight": g, "bias": b}, (z,))


def reference(z: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """Instance normalisation in operations that torch can differentiate any number of times."""
    mean = z.mean(dim=(2, 3), keepdim=True)
    variance = z.var(dim=(2, 3), keepdim=True, correction=0)
    return (z - mean) / (variance + 1e-5).sqrt() * g[:, None, None] + b[:, None, None]


def draw(seed: int, size: tuple[int, int] = (4, 3)) -> Three:
    """Maps with non-zero means, scales other than 1 and shifts other than 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(2, WIDTH, *size), (WIDTH,), (WIDTH,)]
    z, g, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * z + 0.7, g, b


def scalar(function: Function) -> Function:
    """A loss with curvature in the output, so that its second derivatives use every term."""
    return lambda z, g, b: function(z, g, b).sin().mul(torch.arange(24).double().view(2, 1, 4, 3)).sum()


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("explicit", [True, False])
def test_values_are_those_of_the_definition_and_of_group_norm(explicit: bool) -> None:
    """Both forms of the module normalise like nn.GroupNorm(width, width)."""
    z, g, b = draw(0)
    module = torch.nn.GroupNorm(WIDTH, WIDTH).double()
    y = normalise(explicit)(z, g, b)
    assert_close(y, reference(z, g, b))
    assert_close(y, functional_call(module, {"weight": g, "bias": b}, (z,)))


def test_pullback_and_tangent_equal_those_of_group_norm() -> None:
    """First derivatives in z, g and b equal group norm's, backwards and along a direction."""
    at, along, cotangent = draw(0), draw(1), draw(2)[0]
    ours, theirs = (vjp(normalise(explicit), *at)[1](cotangent) for explicit in (True, False))
    for value, expected in zip(ours, theirs, strict=True):
        assert_close(value, expected)
    assert_close(jvp(normalise(True), at, along)[1], jvp(reference, at, along)[1])


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_tangent_along_one_argument_alone(argument: int) -> None:
    """A tangent along one argument alone counts the absent tangents as zero."""

    def along(function: Function) -> Tensor:
        at, direction = draw(0), draw(1)[argument]
        moved = lambda value: function(*at[:argument], value, *at[argument + 1 :])  # noqa: E731
        derivative: Tensor = jvp(moved, (at[argument],), (direction,))[1]
        return derivative

    assert_close(along(normalise(True)), along(reference))


@pytest.mark.parametrize("order", ["reverse over forward", "reverse over reverse"])
def test_gradient_of_the_derivative_along_a_direction(order: str) -> None:
    """The derivative along (zt, gt, bt) has the right gradient in z, g and b, as the reverse step needs."""
    at, along = draw(0), draw(1)

    def directional(function: Function) -> Function:
        if order == "reverse over forward":
            return lambda *at: jvp(scalar(function), at, along)[1]
        gradient = grad(scalar(function), argnums=(0, 1, 2))
        return lambda *at: sum(((d * t).sum() for d, t in zip(gradient(*at), along, strict=True)), torch.zeros(()))

    ours = grad(directional(normalise(True)), argnums=(0, 1, 2))(*at)
    theirs = grad(directional(reference), argnums=(0, 1, 2))(*at)
    for value, expected in zip(ours, theirs, strict=True):
        assert float(expected.norm()) > 1
        assert_close(value, expected)


def test_gradient_in_the_direction() -> None:
    """The derivative along a direction has the right gradient in that direction, which lower layers change."""
    at, along = draw(0), draw(1)

    def directional(function: Function) -> Function:
        return lambda *along: jvp(scalar(function), at, along)[1]

    ours = grad(directional(normalise(True)), argnums=(0, 1, 2))(*along)
    for value, expected in zip(ours, grad(directional(reference), argnums=(0, 1, 2))(*along), strict=True):
        assert_close(value, expected)


def test_every_entry_of_the_second_derivative() -> None:
    """All blocks of the Hessian equal the definition's, forward over reverse as well."""
    at = draw(0)
    expected = hessian(scalar(reference), argnums=(0, 1, 2))(*at)
    reverse_twice = jacrev(jacrev(scalar(normalise(True)), argnums=(0, 1, 2)), argnums=(0, 1, 2))(*at)
    for values, rows in zip(reverse_twice, expected, strict=True):
        for value, block in zip(values, rows, strict=True):
            assert_close(value, block)


def test_second_derivative_equals_finitedifferences() -> None:
    """The gradient of the directional derivative equals central differences of that derivative."""
    at, along, other = draw(0), draw(1), draw(2)

    def directional(*at: Tensor) -> Tensor:
        derivative: Tensor = jvp(scalar(normalise(True)), at, along)[1]
        return derivative

    exact = sum(float((d * t).sum()) for d, t in zip(grad(directional, argnums=(0, 1, 2))(*at), other, strict=True))
    up, down = (directional(*(a + sign * 1e-5 * t for a, t in zip(at, other, strict=True))) for sign in (1, -1))
    assert exact == pytest.approx(float(up - down) / 2e-5, rel=1e-7)


def test_autograd_checks_of_torch_pass() -> None:
    """The module passes torch's numerical checks of first and second derivatives, outside torch.func."""
    inputs = tuple(t.requires_grad_() for t in draw(0, (2, 2)))
    assert torch.autograd.gradcheck(normalise(True), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normalise(True), inputs)


def test_bfloat16_maps_have_float32_statistics() -> None:
    """bfloat16 maps get the float32 result rounded once, which bfloat16 statistics would not give."""
    z, g, b = (t.bfloat16() for t in draw(0, (16, 16)))
    z = z + 8  # far from 0: a bfloat16 mean is off by a good part of the deviation
    y = normalise(True)(z, g, b)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, reference(z.float(), g.float(), b.float()).bfloat16())
    assert not torch.equal(y, reference(z, g, b))
