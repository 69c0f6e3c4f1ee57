"""Tests the memory and operations of one image in a network, counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from datm_ray.config import NetworkSpec
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.networks.registry import build_network


def test_maps_and_operations_are_counted() -> None:
    """Maps and operations of a convolution, a rectifier and a linear layer equal a count by hand."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 10)).double()
    maps, products = 5 * 4 * 4, 5 * 4 * 4 * (3 * 3 * 3) + 5 * 4 * 4 * 10
    parameters = 5 * 3 * 9 + 5 + 800 + 10
    assert image_cost(network, (3, 4, 4)) == ImageCost(4 * (2 * maps + 10), 4 * maps, 2 * products, 3, parameters)
    assert next(network.parameters()).dtype == torch.float64  # the network itself stays as it was
    assert network.training


def test_the_largest_map_is_that_before_the_first_pooling() -> None:
    """ConvNet's largest map precedes the first pooling: 128 channels of 32x32 in float32."""
    network = build_network(NetworkSpec(channels=3, size=(32, 32), classes=10, width=128, depth=3), seed=0)
    assert image_cost(network, (3, 32, 32)).largest == 4 * 128 * 32 * 32


def test_functions_may_be_called_by_keywords() -> None:
    """Costs are counted too where a network calls conv2d(input=..., weight=...) by keywords."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.last = nn.Parameter(torch.ones(5, 3, 3, 3)), nn.Parameter(torch.ones(10, 20))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = torch.conv2d(input=images, weight=self.kernel)
            return nn.functional.linear(input=maps.flatten(1), weight=self.last)

    assert image_cost(Own(), (3, 4, 4)) == ImageCost(4 * 30, 4 * 3 * 16, 2 * (20 * 27 + 200), 2, 5 * 27 + 200)
