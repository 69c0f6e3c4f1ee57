"""Tests MetaDD: its maps and its loss equal the published formulas, and its gradient is exact on every path."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import googlenet, resnet18, vit_b_16

from datm_ray.config import PUBLISHED_AUGMENTATION, MetaLossConfig, NetworkSpec
from datm_ray.core.images.augment import Augmentation, augment, draw_augmentation
from datm_ray.core.metadd import (
    Evidence,
    MetaDD,
    MetaLoss,
    evidence,
    meta_feature_ratio,
    meta_loss,
    scaled_maps,
)
from datm_ray.core.networks.architectures import SpatialNetwork
from datm_ray.core.networks.registry import build_network, network_names
from datm_ray.core.randomness import Purpose, generator
from datm_ray.errors import ConfigError

CLASSES, SIZE = 4, (16, 16)
SPATIAL = [name for name in network_names() if name != "mlp"]
THREE = ("convnet", "resnet18", "lenet")
PARTS = ("total", "variance", "invariance", "position", "ratio")


def network(name: str, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A small float64 network in evaluation mode."""
    spec = NetworkSpec(architecture=name, channels=3, size=SIZE, classes=classes, width=8, depth=2)
    return build_network(spec, seed).double().eval()


def draw(count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *SIZE, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def drawn_for(count: int = 5) -> list[Augmentation]:
    """Augmentations of one sample, of several operations."""
    streams = [generator(3, Purpose.META_AUGMENTATION, number) for number in range(count)]
    return [draw_augmentation(PUBLISHED_AUGMENTATION, 1, stream) for stream in streams]


@pytest.fixture(scope="module")
def three() -> list[nn.Module]:
    """Networks of three architectures, the backbone first."""
    return [network(name, seed) for seed, name in enumerate(THREE)]


def gradient_of(loss: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient by one pass of torch's automatic differentiation."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(images), images)
    return gradient


@pytest.mark.parametrize("name", SPATIAL)
def test_every_architecture_with_maps_shows_evidence(name: str) -> None:
    """Evidence has the images' size, a derivative in every image, and the network's own logits."""
    images, labels = draw()
    module = network(name)
    seen = evidence(module, images, labels)
    assert seen.maps.shape == (5, *SIZE)
    assert torch.equal(seen.logits, module(images))
    single = torch.cat([evidence(module, images[n : n + 1], labels[n : n + 1]).maps for n in range(5)])
    assert torch.allclose(single, seen.maps)
    slope = gradient_of(lambda x: evidence(module, x, labels).maps.square().sum(), images)
    assert bool((slope.flatten(1).norm(dim=1) > 0).all())


@pytest.mark.parametrize("name", ["resnet18", "vit-small"])
def test_maps_of_averaging_networks_are_class_activation_maps(name: str) -> None:
    """Maps weight the features by the classifier; their mean is the logit less the bias."""
    images, labels = draw()
    module = network(name)
    maps = (module.features(images) * module.classifier.weight[labels][:, :, None, None]).sum(1)  # type: ignore
    seen = evidence(module, images, labels)
    assert torch.allclose(seen.maps, interpolate(maps[:, None], SIZE, mode="bilinear")[:, 0])
    logits = maps.mean(dim=(1, 2)) + module.classifier.bias[labels]  # type: ignore[index, union-attr]
    assert torch.allclose(logits, seen.logits.gather(1, labels[:, None])[:, 0])


def test_the_derivative_of_maps_matches_finitedifferences(three: list[nn.Module]) -> None:
    """The derivative of the whole loss equals finite differences along random directions, in float64."""
    images, labels = draw(3)
    metadd = MetaDD(three)
    exact = gradient_of(lambda x: metadd.loss(x, labels).total, images)
    for seed in range(3):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-8  # short, so that no rectifier or maximum changes over
        after, before = (float(metadd.loss(images + sign * step * way, labels).total.detach()) for sign in (1, -1))
        assert (after - before) / (2 * step) == pytest.approx(float((exact * way).sum()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        MetaLossConfig(),
        MetaLossConfig(variance=0.3, invariance=2.0, position=0.1, divergence=-0.5, variance_of="logits"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 5, 20])
def test_the_gradient_in_parts_is_that_of_the_whole(
    three: list[nn.Module], options: MetaLossConfig, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient taken some images at a time equals that of one graph over all; networks see each image once."""
    images, labels = draw()
    metadd = MetaDD(three, options)
    whole = metadd.loss(images, labels).detach()
    exact = gradient_of(lambda x: metadd.loss(x, labels).total, images.detach())
    seen: list[int] = []

    def counted(network: nn.Module, images: Tensor, *rest: Any) -> Evidence:
        seen.append(len(images))
        return evidence(network, images, *rest)

    monkeypatch.setattr("datm_ray.core.metadd.evidence", counted)
    loss, gradient = metadd.gradient(images, labels, chunk=chunk)
    assert sum(seen) == 3 * len(images)
    assert float((gradient - exact).norm() / exact.norm()) < 1e-12
    for part in PARTS:
        assert float(getattr(loss, part)) == pytest.approx(float(getattr(whole, part)))


def test_labels_are_read_once(three: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call reads the labels once, not for each network and part; never if it is given the number of classes."""
    images, labels = draw()
    read: list[Tensor] = []
    monkeypatch.setattr("datm_ray.core.metadd._largest", lambda each: read.append(each) or int(each.max()))
    metadd = MetaDD(three)
    for call in (metadd.loss, functools.partial(metadd.gradient, chunk=1), functools.partial(metadd.evidence, chunk=1)):
        call(images, labels)  # type: ignore[operator]
        assert len(read) == 1
        read.clear()
    metadd.gradient(images, labels, chunk=1, classes=CLASSES)
    metadd.evidence(images, labels, chunk=1, classes=CLASSES)
    assert not read
    with pytest.raises(ConfigError, match="has 4 classes, but an image is of class 6"):
        metadd.gradient(images, labels, classes=7)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_gradient_goes_through_every_images_augmentation(three: list[nn.Module], chunk: int) -> None:
    """Networks see each image under its own augmentation; the gradient is that of one graph in the raw images."""
    images, labels = draw()
    drawn, metadd = drawn_for(), MetaDD(three)
    assert len({each.operation for each in drawn}) > 2

    def whole(x: Tensor) -> Tensor:
        return metadd.loss(torch.cat([augment(x[n : n + 1], one) for n, one in enumerate(drawn)]), labels).total

    exact = gradient_of(whole, images)
    loss, gradient = metadd.gradient(images, labels, chunk=chunk, augmentations=drawn)
    assert float(loss.total) == pytest.approx(float(whole(images).detach()))
    assert float((gradient - exact).norm() / exact.norm()) < 1e-12
    assert not torch.allclose(gradient, metadd.gradient(images, labels, chunk=chunk)[1])


class _Column:
    """Sums between threads that make the same calls."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list[Tensor] = [torch.empty(0)] * size

    def all_sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def sum_(tensor: Tensor) -> Tensor:
            self._given[rank] = tensor
            self._barrier.wait()
            total = torch.stack(self._given).sum(dim=0)
            self._barrier.wait()
            return total

        return sum_


@pytest.mark.parametrize("places", [((0,), (1,), (2,)), ((0, 2), (1,)), ((0, 1, 2), ())])
def test_apart_networks_exchange_maps_and_logits_and_have_the_whole_gradient(
    three: list[nn.Module], places: tuple[tuple[int, ...], ...]
) -> None:
    """Networks in several processes add up to the gradient of one process, and each process has the loss."""
    images, labels = draw()
    drawn = drawn_for()
    whole, exact = MetaDD(three).gradient(images, labels, augmentations=drawn)
    column = _Column(len(places))
    answers: list[tuple[MetaLoss, Tensor]] = [(whole, exact)] * len(places)

    def work(rank: int) -> None:
        mine = MetaDD({place: three[place] for place in places[rank]})
        answers[rank] = mine.gradient(
            images,
            labels,
            networks=3,
            classes=CLASSES,
            chunk=2,
            augmentations=drawn,
            all_sum=column.all_sum(rank),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.allclose(sum((gradient for _, gradient in answers), torch.zeros_like(exact)), exact, rtol=1e-12)
    for loss, _ in answers:
        assert [float(getattr(loss, part)) for part in PARTS] == pytest.approx(
            [float(getattr(whole, part)) for part in PARTS]
        )


def test_shards_of_the_images_add_up(three: list[nn.Module]) -> None:
    """Gradients of shards of the images add up to the whole, also where a shard is empty."""
    images, labels = draw()
    metadd, drawn = MetaDD(three), drawn_for()
    whole, exact = metadd.gradient(images, labels, augmentations=drawn)
    parts = [
        metadd.gradient(images[held], labels[held], over=5, augmentations=drawn[held])
        for held in (slice(0, 3), slice(3, 3), slice(3, 5))
    ]
    assert torch.allclose(torch.cat([gradient for _, gradient in parts]), exact, rtol=1e-12)
    assert sum(float(loss.total) for loss, _ in parts) == pytest.approx(float(whole.total))


def test_the_terms_are_those_of_the_formulas() -> None:
    """The terms equal values computed by hand for two networks, one 2x2 image and two classes."""
    maps = torch.tensor([[[[0.0, 2.0], [1.0, 4.0]]], [[[-1.0, 0.0], [0.0, 3.0]]]])
    logits = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
    loss = meta_loss(
        Evidence(maps, logits),
        torch.tensor([0]),
        MetaLossConfig(variance=2.0, invariance=3.0, position=5.0, divergence=-0.5),
    )
    first, second = torch.tensor([0, 0.5, 0.25, 1]), torch.tensor([0, 0.25, 0.25, 1])
    assert float(loss.variance) == pytest.approx(float((first - second).square().mean() / 4))
    share = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    divergence = share * (2 * share).log() + (1 - share) * (2 * (1 - share)).log()
    assert float(loss.invariance) == pytest.approx(float(-share.log() - 0.5 * divergence))
    assert float(loss.position) == pytest.approx(1 / 8)
    assert float(loss.total) == pytest.approx(
        float(2 * loss.variance + 3 * loss.invariance + 5 * loss.position), rel=1e-6
    )
    assert float(loss.ratio) == pytest.approx(1 / 2)


def test_the_ratio_counts_pixels_one_by_one() -> None:
    """Meta features reach the threshold in all maps; the ratio divides their number by that of any map's features."""
    scaled = torch.rand(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for threshold in (0.3, 0.5, 0.7):
        reached = [[[float(value) >= threshold for value in pixel] for pixel in each.flatten(1).T]
                   for each in scaled.unbind(1)]  # fmt: skip
        expected = torch.tensor([sum(map(all, each)) / sum(map(any, each)) for each in reached])
        assert torch.allclose(meta_feature_ratio(scaled, threshold), expected)
    assert float(meta_feature_ratio(torch.zeros(2, 1, 4, 4)).sum()) == 0.0


def test_a_map_of_one_value_has_no_derivative() -> None:
    """A constant map gets derivative zero, where the formula would give infinity."""
    flat = torch.ones(1, 3, 3, requires_grad=True)
    scaled = scaled_maps(flat)
    (gradient,) = torch.autograd.grad(scaled.sum(), flat)
    assert float(scaled.detach().abs().sum()) == 0.0
    assert float(gradient.abs().sum()) == 0.0


@pytest.mark.parametrize("side", [2, 3, 7])
def test_a_map_of_one_value_stays_one_when_it_is_resized(side: int) -> None:
    """Resizing a constant map leaves no feature from rounding."""
    resized = interpolate(torch.full((1, 1, side, side), 0.3), (32, 32), mode="bilinear")
    assert float(resized.max()) - float(resized.min()) < 1e-6
    assert float(scaled_maps(resized).abs().sum()) == 0.0


def test_networks_are_copied_frozen_and_evaluated() -> None:
    """MetaDD changes neither the caller's network nor its running statistics, and is not changed by it."""
    spec = NetworkSpec(channels=3, size=SIZE, classes=CLASSES, width=4, depth=2, norm="batch")
    modules = [build_network(spec, seed).double().train() for seed in (0, 1)]
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    images, labels = draw()
    MetaDD(modules).gradient(images, labels)
    MetaDD(modules).loss(images.requires_grad_(), labels).total.backward()
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(module.training for module in modules)
    assert all(p.requires_grad and p.grad is None for module in modules for p in module.parameters())


@pytest.mark.parametrize("build", [resnet18, googlenet])
def test_networks_of_torchvision_can_be_handed_over(build: Callable[..., nn.Module]) -> None:
    """MetaDD finds the maps of torchvision's networks; resnet18's are the input of its average."""
    options = {"aux_logits": False, "init_weights": False} if build is googlenet else {}
    module = build(num_classes=CLASSES, **options).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = evidence(module, images, torch.tensor([0, 1]))
    assert seen.maps.shape == (2, 64, 64)
    assert torch.allclose(seen.logits, module(images))
    if build is resnet18:
        maps: list[Tensor] = []
        module.avgpool.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0]))  # type: ignore
        module(images)
        weights = module.fc.weight[[0, 1]][:, :, None, None]  # type: ignore[index, union-attr]
        small = (maps[0] * weights).sum(dim=1, keepdim=True)
        assert torch.allclose(seen.maps, interpolate(small, (64, 64), mode="bilinear")[:, 0])


def test_in_a_loop_of_distribution_matching() -> None:
    """MetaDD, added to a user's own loop by three lines, raises the share of features common to networks."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, *SIZE, generator=generator, dtype=torch.float64)
    synthetic, labels = real[:4].clone().requires_grad_(), torch.arange(4)
    backbone, embed = network("convnet"), network("convnet", 7)
    metadd = MetaDD(
        [backbone, network("resnet18", 1), network("lenet", 2)],
        MetaLossConfig(variance=10.0, invariance=0.0, position=0.0),
    )
    optimizer = torch.optim.SGD([synthetic], lr=1.0, momentum=0.5)
    losses = []
    for _ in range(30):
        matching = (embed.features(real).mean(dim=0) - embed.features(synthetic).mean(dim=0)).square().sum()  # type: ignore
        meta = metadd.loss(synthetic, labels)
        optimizer.zero_grad()
        (matching + meta.total).backward()
        optimizer.step()
        losses.append(meta.detach())
    assert float(losses[-1].variance) < 0.8 * float(losses[0].variance)
    assert float(losses[-1].ratio) > float(losses[0].ratio)


def test_the_documented_loop_adds_the_loss() -> None:
    """The code of docs/methods/metadd.md adds MetaDD's loss to that of a user's own loop; both have gradients."""
    page = (Path(__file__).parents[2] / "docs/methods/metadd.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    images, labels = draw()
    embedding: Any = network("convnet", 7)
    names: dict[str, Any] = {
        "backbone": network("convnet"),
        "resnet": network("resnet18", 1),
        "vgg": network("vgg11", 2),
        "embed": embedding.features,
        "real": draw(seed=1)[0],
        "synthetic": images.clone().requires_grad_(),
        "labels": labels,
    }
    exec(code, names)
    meta = names["metadd"].loss(images, labels)
    torch.testing.assert_close(names["loss"] - names["matching"], meta.total)
    for loss in (names["loss"] - names["matching"], names["matching"]):
        (gradient,) = torch.autograd.grad(loss, names["synthetic"], retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_what_cannot_be_compared_is_refused() -> None:
    """A single network, unequal label sets, or a network without maps is one line of error."""
    images, labels = draw()
    with pytest.raises(ConfigError, match="several networks, and was given 1"):
        MetaDD([network("convnet")])
    strangers = MetaDD([network("convnet"), network("lenet", classes=7)])
    for call in (strangers.loss, strangers.gradient):
        with pytest.raises(ConfigError, match="have 4 and 7 classes"):
            call(images, labels)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="has no feature maps"):
        MetaDD([network("convnet"), network("mlp")]).loss(images, labels)
    one_position = SpatialNetwork(nn.Conv2d(3, 4, 16), nn.Identity(), nn.Linear(4, CLASSES)).double()
    with pytest.raises(ConfigError, match="have only one position"):
        evidence(one_position, images, labels)
    flat = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 256, CLASSES)).double()
    with pytest.raises(ConfigError, match="has no feature maps"):
        evidence(flat, images, labels)
    with pytest.raises(ConfigError, match="has 4 classes, but an image is of class 9"):
        evidence(network("lenet"), images, labels + 9 - 3)
    transformer = vit_b_16(image_size=32, num_classes=CLASSES).eval()
    with pytest.raises(ConfigError, match="is a transformer"):
        evidence(transformer, torch.randn(1, 3, 32, 32), torch.tensor([0]))
