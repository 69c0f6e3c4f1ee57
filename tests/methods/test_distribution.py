"""Tests distribution matching against the obvious way to compute it, in float64, and its draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datm_ray.config import NetworkConfig
from datm_ray.core.images.augment import Augmentation, augment
from datm_ray.core.networks.registry import build_network, embedding
from datm_ray.core.synthetic import draw_rows
from datm_ray.errors import ConfigError
from datm_ray.methods.distribution import EmbeddingFunctions, distance_and_gradient, draw_shared

DSA = "color_crop_cutout_flip_scale_rotate"
CLASSES, IPC = 4, 3


def problem(network: NetworkConfig, iteration: int = 0) -> tuple[nn.Module, Tensor, list[Tensor], list[Augmentation]]:
    """A network, synthetic images of four classes, 5 to 8 real images of each, and their augmentations, in float64."""
    torch.manual_seed(iteration)
    module = build_network(network.for_images(3, (8, 8), CLASSES), iteration).double().requires_grad_(False)
    real = [torch.randn(5 + each, 3, 8, 8, dtype=torch.float64) for each in range(CLASSES)]
    synthetic = torch.randn(CLASSES * IPC, 3, 8, 8, dtype=torch.float64)
    return module, synthetic, real, [draw_shared(DSA, 0, iteration, label) for label in range(CLASSES)]


def obvious(
    network: nn.Module, synthetic: Tensor, real: Sequence[Tensor], augmentations: Sequence[Augmentation]
) -> tuple[Tensor, Tensor]:
    """The loss as the paper writes it, differentiated by autograd through everything."""
    images, loss = synthetic.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for own, theirs, augmentation in zip(images.split(IPC), real, augmentations, strict=True):
        means = []
        for each in (own, theirs):
            alike = Augmentation(augmentation.operation, np.repeat(augmentation.parameters, len(each), axis=0))
            means.append(embedding(network, augment(each, alike)).mean(dim=0))
        loss = loss + (means[0] - means[1]).square().sum()
    return loss.detach(), torch.autograd.grad(loss, images)[0]


def computed(
    network: nn.Module,
    synthetic: Tensor,
    real: Sequence[Tensor],
    augmentations: Sequence[Augmentation],
    *,
    sizes: tuple[int, int] = (IPC, 8),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and gradient as the method computes them, uncompiled unless `options` say otherwise."""
    functions = EmbeddingFunctions(network, **{"compiled": False, **options})
    values = functions.values_of(network)
    return distance_and_gradient(functions, values, synthetic, real, augmentations, sizes)


@pytest.mark.parametrize(
    "network",
    [
        NetworkConfig(width=4, depth=2),
        NetworkConfig(width=4, depth=2, norm="group", pooling="max"),
        NetworkConfig(architecture="resnet18", width=4),
        NetworkConfig(architecture="mlp", width=8),
        NetworkConfig(architecture="vit-small", width=8),
    ],
    ids=lambda network: f"{network.architecture} {network.norm}",
)
def test_gradient_is_that_of_autograd_whatever_the_micro_batches(network: NetworkConfig) -> None:
    """Loss and gradient are those of plain autograd, whatever DSA draws, in micro-batches of any size."""
    for iteration in range(12 if network.pooling == "max" else 2):
        arguments = problem(network, iteration)
        expected = obvious(*arguments)
        for sizes in ((IPC, 8), (1, 1), (2, 3), (IPC, 100)) if iteration < 2 else ((2, 3),):
            torch.testing.assert_close(computed(*arguments, sizes=sizes), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
def test_compiled_gradient_is_the_uncompiled_one(channels_last: bool) -> None:
    """Compiled code fills micro-batches up to one shape, and every class still has its own mean."""
    arguments = problem(NetworkConfig(width=4, depth=2))
    found = computed(*arguments, sizes=(2, 5), compiled=True, channels_last=channels_last)
    torch.testing.assert_close(found, obvious(*arguments), rtol=1e-9, atol=1e-12)


def test_bfloat16_changes_the_gradient_little() -> None:
    """In bfloat16 the gradient points where the exact one does, and is no exact copy of it."""
    network, *rest = problem(NetworkConfig(width=16, depth=2))
    exact = obvious(network, *rest)[1]
    found = computed(network, *rest, precision="bfloat16")[1]
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1


class Branching(nn.Flatten):
    """Layer that decides by values, so that it has no graph."""

    def forward(self, images: Tensor) -> Tensor:
        result = super().forward(images)
        return result if bool(images.mean() > 0) else -result


def test_a_network_that_cannot_be_compiled_is_refused_with_what_to_do() -> None:
    """A network that decides by values runs uncompiled; compiled, one line says how to go on."""
    network, images = nn.Sequential(Branching(), nn.Linear(192, 2)), torch.rand(2, 3, 8, 8)
    functions = EmbeddingFunctions(network, compiled=False)
    values = functions.values_of(network)
    assert functions.forward(values, images, 2).shape == (2, 192)
    with pytest.raises(ConfigError, match=r"cannot be compiled.*--set cluster\.compile=false"):
        EmbeddingFunctions(network).forward(values, images, 2)


class Scaled(nn.Linear):
    """Layer that multiplies by random numbers of its own, and chooses by random places."""

    def __init__(self, seed: int, places_seed: int = 0) -> None:
        super().__init__(192, 6)
        self.register_buffer("scale", torch.rand(6, generator=torch.Generator().manual_seed(seed)))
        places = torch.randperm(6, generator=torch.Generator().manual_seed(places_seed))
        self.register_buffer("places", places)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = (super().forward(images) * self.scale)[:, self.places]
        return result


def test_buffers_of_a_network_are_its_own() -> None:
    """Random numbers in buffers travel with the parameters; whole numbers cannot, and are refused if they differ."""
    first, second, other = (
        nn.Sequential(nn.Flatten(), Scaled(*seeds), nn.Linear(6, 2)) for seeds in ((1,), (2,), (2, 1))
    )
    functions, images = EmbeddingFunctions(first, compiled=False), torch.randn(5, 3, 8, 8)
    found = functions.forward(functions.values_of(second), images, 5)
    torch.testing.assert_close(found, second[:-1](images).detach())
    assert not torch.allclose(found, functions.forward(functions.values_of(first), images, 5))
    with pytest.raises(ConfigError, match="draws buffers of whole numbers"):
        functions.values_of(other)


@pytest.mark.parametrize("parts", [(2, 2), (1, 1, 1, 1), (3, 1)])
def test_classes_divide_without_a_sum(parts: tuple[int, ...]) -> None:
    """Shards of the classes have the gradients of one process, and losses that add up to its loss."""
    network, synthetic, real, augmentations = problem(NetworkConfig(width=4, depth=2))
    whole = computed(network, synthetic, real, augmentations)
    bounds = np.cumsum([0, *parts])
    shards = [
        computed(network, synthetic[IPC * a : IPC * b], real[a:b], augmentations[a:b]) for a, b in pairwise(bounds)
    ]
    torch.testing.assert_close(torch.stack([loss for loss, _ in shards]).sum(), whole[0], rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([gradient for _, gradient in shards]), whole[1])


def test_all_images_of_a_class_are_augmented_alike() -> None:
    """Synthetic images that equal the real ones have distance 0, whatever is drawn."""
    for iteration in range(12):
        network, synthetic, _, augmentations = problem(NetworkConfig(width=4, depth=2), iteration)
        loss, gradient = computed(network, synthetic, synthetic.split(IPC), augmentations)
        assert float(loss) < 1e-20
        assert float(gradient.abs().max()) < 1e-10


def test_draws_depend_on_seed_iteration_and_class_alone() -> None:
    """A class has its own draws in every iteration: real images without repetition, and one augmentation."""
    rows = np.arange(100, 140)

    def drawn(*counters: int, count: int = 10) -> tuple[str, ...]:
        real, shared = draw_rows(rows, count, *counters), draw_shared(DSA, *counters)
        assert len(set(real.tolist())) == min(count, 40)
        assert set(real.tolist()) <= set(rows.tolist())
        assert shared.parameters.shape == (1, 3)
        return (*map(str, real), shared.operation, *map(str, shared.parameters[0]))

    assert drawn(0, 5, 2) == drawn(0, 5, 2)
    assert len({drawn(0, 5, 2), drawn(1, 5, 2), drawn(0, 6, 2), drawn(0, 5, 3), drawn(0, 2, 5)}) == 5
    assert len(drawn(0, 0, 0, count=256)) == 40 + 1 + 3


def test_embeddings_are_what_the_classifier_reads() -> None:
    """The published ConvNet has 2,048 numbers at 32x32; every network's logits are its classifier of them."""
    convnet = build_network(NetworkConfig().for_images(3, (32, 32), 10), 0)
    images = torch.randn(2, 3, 32, 32)
    assert embedding(convnet, images).shape == (2, 2048)
    for name in ("convnet", "lenet", "alexnet", "vgg11"):
        network = build_network(NetworkConfig(architecture=name, width=8).for_images(3, (32, 32), 10), 0)
        assert torch.equal(network.classifier(embedding(network, images)), network(images))  # type: ignore[operator]
    with pytest.raises(ConfigError, match="does not show where its classifier begins"):
        embedding(nn.Flatten(), images)
