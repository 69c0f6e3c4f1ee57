"""Tests parameters as one vector: a copy, in a fixed order, and differentiable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from datm_ray.config import NetworkSpec
from datm_ray.core.networks.parameters import FlatNetwork, flatten, unflatten_into
from datm_ray.core.networks.registry import build_network

SPEC = NetworkSpec(channels=1, size=(8, 8), classes=3, width=4, depth=2)


def test_flatten_is_a_copy() -> None:
    """A flattened vector does not change with further training of the network."""
    module = build_network(SPEC, 0)
    snapshot = flatten(module)
    before = snapshot.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(snapshot, before)
    assert not snapshot.requires_grad


def test_unflatten_undoes_flatten() -> None:
    """Unflatten makes another network equal to the flattened one, without sharing the vector's memory."""
    source, other = build_network(SPEC, 0), build_network(SPEC, 1)
    vector = flatten(source)
    unflatten_into(other, vector)
    assert torch.equal(flatten(other), vector)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name))


def test_unflatten_keeps_the_layout_of_the_weights() -> None:
    """A channels-last network, 1x1 convolutions too, stays channels-last and gets the numbers of the vector."""
    source = build_network(SPEC, 0)
    source.add_module("narrow", nn.Conv2d(4, 6, 1))
    other = copy.deepcopy(source).to(memory_format=torch.channels_last)
    layouts = [each.stride() for each in other.parameters()]
    assert layouts != [each.stride() for each in source.parameters()]
    vector = torch.randn(len(flatten(source)))
    for each in (source, other):
        unflatten_into(each, vector)
        assert torch.equal(flatten(each), vector)
    assert [each.stride() for each in other.parameters()] == layouts


def test_layers_are_the_named_parameters() -> None:
    """The vector's pieces have the module's names and shapes, in its order."""
    module = build_network(SPEC, 0)
    network = FlatNetwork(module)
    layers = network.layers(flatten(module))
    assert list(layers) == list(network.names) == [name for name, _ in module.named_parameters()]
    assert all(torch.equal(layers[name], parameter) for name, parameter in module.named_parameters())
    assert network.count == sum(parameter.numel() for parameter in module.parameters())


def test_flat_network_equals_the_module_at_those_parameters() -> None:
    """The flat network equals the module at the vector, and does not change the module's parameters."""
    module, other = build_network(SPEC, 0), build_network(SPEC, 1)
    before, images = flatten(module), torch.randn(5, 1, 8, 8)
    assert torch.equal(FlatNetwork(module)(flatten(other), images), other(images))
    assert torch.equal(flatten(module), before)


def test_gradient_through_the_vector_equals_the_modules() -> None:
    """The gradient in the vector equals the gradients of the module's parameters."""
    module, images = build_network(SPEC, 0), torch.randn(5, 1, 8, 8)
    module(images).square().sum().backward()
    expected = torch.cat(
        [parameter.grad.reshape(-1) for parameter in module.parameters() if parameter.grad is not None]
    )
    vector = flatten(module).requires_grad_()
    (gradient,) = torch.autograd.grad(FlatNetwork(module)(vector, images).square().sum(), vector)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_vector_of_another_network_is_refused(more: int) -> None:
    """A vector of another length is refused, also if it is too long."""
    network = build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=2, depth=1), 0)
    with pytest.raises(ValueError, match="numbers for a network of"):
        unflatten_into(network, torch.zeros(len(flatten(network)) + more))
