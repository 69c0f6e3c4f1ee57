"""Tests ConvNet as published, the registry, and initialisation from a seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datm_ray.config import NetworkSpec, RunConfig, override
from datm_ray.core.networks import registry as networks
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.networks.registry import build_network, couples_samples, network_names, register_network
from datm_ray.errors import ConfigError

TINY = NetworkSpec(channels=1, size=(8, 8), classes=3, width=4, depth=2)


@pytest.mark.parametrize(
    ("size", "classes", "depth", "count"),
    [(32, 10, 3, 320_010), (32, 100, 3, 504_420), (64, 200, 4, 857_160)],
    ids=["CIFAR-10", "CIFAR-100", "Tiny-ImageNet"],
)
def test_convnet_has_the_published_number_of_parameters(size: int, classes: int, depth: int, count: int) -> None:
    """ConvNet has the published number of parameters for the published width, depth, norm and head."""
    network = build_network(NetworkSpec(channels=3, size=(size, size), classes=classes, depth=depth), 0)
    assert len(flatten(network)) == count


@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (9, 14))])
def test_every_variant_gives_logits(channels: int, size: tuple[int, int], norm: str, pooling: str) -> None:
    """Every variant gives logits for any channels, unequal sides, and sides that are no powers of two."""
    spec = NetworkSpec(channels=channels, size=size, classes=5, width=4, depth=2, norm=norm, pooling=pooling)  # type: ignore[arg-type]
    logits = build_network(spec, 0)(torch.randn(2, channels, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_instance_norm_normalises_each_channel_of_each_image() -> None:
    """At the start every map has mean 0 and variance 1, whatever the rest of the batch."""
    block = build_network(TINY, 0).get_submodule("features.1")
    maps = torch.randn(2, 4, 8, 8) * 7 + 3
    normal = block(maps)
    torch.testing.assert_close(normal.mean(dim=(2, 3)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(dim=(2, 3), unbiased=False), torch.ones(2, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("norm", "couples"), [("instance", False), ("group", False), ("none", False), ("batch", True)])
def test_only_batch_norm_couples_samples(norm: str, couples: bool) -> None:
    """`couples_samples` says whether another image of the batch changes an image's logits."""
    network = build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=4, depth=2, norm=norm), 0)  # type: ignore[arg-type]
    image, one, other = torch.randn(3, 1, 1, 8, 8)
    logits = [network(torch.cat([image, companion]))[0] for companion in (one, other)]
    assert couples_samples(network) is couples
    assert torch.allclose(*logits, atol=1e-6) is not couples


def test_seed_alone_decides_the_parameters() -> None:
    """The seed gives pinned parameters, whatever the state of torch's global generator."""
    torch.manual_seed(1)
    first = flatten(build_network(TINY, 5))
    torch.manual_seed(2)
    assert torch.equal(flatten(build_network(TINY, 5)), first)
    assert not torch.equal(flatten(build_network(TINY, 6)), first)
    torch.testing.assert_close(first[-3:], torch.tensor([0.0412257, -0.0696071, 0.1790131]), atol=1e-6, rtol=0)


def test_building_leaves_the_global_generator_alone() -> None:
    """Building a network does not advance torch's global generator."""
    before = torch.random.get_rng_state()
    build_network(TINY, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_deep_a_network_is_refused_with_the_depth_that_fits() -> None:
    """A ConvNet too deep for its image is an error that names the depth that fits."""
    build_network(NetworkSpec(channels=1, size=(8, 9), classes=2, width=4, depth=3), 0)
    with pytest.raises(ConfigError, match=r"8x9 image, which every block halves\. Use a depth of at most 3"):
        build_network(NetworkSpec(channels=1, size=(8, 9), classes=2, width=4, depth=4), 0)


@pytest.mark.parametrize("name", network_names())
def test_any_architecture_can_be_named_alone(name: str) -> None:
    """An architecture can be named alone; ConvNet's defaults for the other values are no error."""
    config = override(RunConfig(), [f"network.architecture={name}"])
    spec = config.network.for_images(1, (8, 8), 10)
    with torch.device("meta"):
        assert build_network(spec, 0)(torch.empty(2, 1, 8, 8)).shape == (2, 10)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    """An unknown architecture is an error that lists the known ones."""
    with pytest.raises(ConfigError, match=r"'resnet-1'.*convnet.*resnet18"):
        build_network(NetworkSpec(architecture="resnet-1", channels=1, size=(8, 8), classes=2), 0)


def test_registered_architecture_can_be_built_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's network joins the registry by a decorator and is initialised from its seed."""
    monkeypatch.setattr(networks, "_BUILDERS", dict(networks._BUILDERS))

    @register_network("linear")
    def linear(spec: NetworkSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(spec.channels * spec.size[0] * spec.size[1], spec.classes))

    assert "linear" in network_names()
    spec = NetworkSpec(architecture="linear", channels=1, size=(2, 2), classes=3)
    assert torch.equal(flatten(build_network(spec, 1)), flatten(build_network(spec, 1)))
