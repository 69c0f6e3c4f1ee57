"""Tests the architectures: their sizes, their equality with torchvision's, and the transforms that the numerics use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy
from torchvision.models import mobilenet_v2, resnet, vgg, vision_transformer

from datm_ray.config import NetworkConfig, NetworkSpec
from datm_ray.core.networks.architectures import SpatialNetwork
from datm_ray.core.networks.instance_norm import InstanceNorm
from datm_ray.core.networks.parameters import FlatNetwork, flatten, unflatten_into
from datm_ray.core.networks.registry import build_network, couples_samples, network_names, spatial_features
from datm_ray.errors import ConfigError
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions, soft_cross_entropy

NORMALISED = ("convnet", "mobilenet-v2", "resnet18", "resnet50", "vgg11")
UNNORMALISED = ("alexnet", "lenet", "mlp", "vit-small")
SPATIAL = tuple(name for name in (*NORMALISED, *UNNORMALISED) if name != "mlp")
UNCOUPLED = [(name, norm) for name in NORMALISED for norm in ("instance", "group", "none")]
UNCOUPLED += [(name, "none") for name in UNNORMALISED]
VARIANTS = [*UNCOUPLED, *((name, "batch") for name in NORMALISED)]


def spec_of(
    name: str, size: int | tuple[int, int] = 8, channels: int = 3, norm: Any = "none", width: int = 8
) -> NetworkSpec:
    """A spec of three classes and a sixteenth of the published width, so that every layer exists and costs little."""
    sides = (size, size) if isinstance(size, int) else size
    return NetworkSpec(architecture=name, channels=channels, size=sides, classes=3, width=width, depth=2, norm=norm)


def published(name: str, channels: int, side: int, **changes: Any) -> NetworkSpec:
    """A spec of ten classes and the published width, for square images."""
    return NetworkConfig(architecture=name, **changes).for_images(channels, (side, side), 10)


def make(name: str, norm: str = "none") -> tuple[nn.Module, Tensor, Tensor]:
    """A network for 8x8 pixels, three images and their classes, in float64."""
    network = build_network(spec_of(name, norm=norm), 0).double()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return network, images, torch.tensor([0, 1, 2])


def meta_network(spec: NetworkSpec) -> nn.Module:
    """A network on the meta device, for its shapes alone."""
    with torch.device("meta"):
        return build_network(spec, 0)


def test_every_registered_architecture_is_tested_here() -> None:
    """Every registered architecture is in the tables of this file, except the ResNet-50 with more blocks."""
    assert sorted((*NORMALISED, *UNNORMALISED, "resnet101")) == network_names()


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
def test_logits_depend_on_the_image(name: str, norm: str) -> None:
    """Logits depend on the image in every architecture, down to 8x8 pixels."""
    width = 8 if name in ("convnet", "mlp") else 32
    for size, channels in ((8, 1), (28, 1), (32, 3), (64, 3)):
        network = build_network(spec_of(name, size, channels, norm, width), 0)
        images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            one, other = network(images)
        assert one.shape == (3,), size
        assert one.isfinite().all(), size
        assert (one - other).norm() > 1e-3 * one.norm(), size


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
def test_any_size_and_channels_give_logits(name: str, norm: str) -> None:
    """Any channels and sides give logits: unequal sides, no powers of two, larger images."""
    for channels, *size in ((1, 9, 14), (3, 30, 40), (1, 128, 96), (3, 128, 128)):
        network = build_network(spec_of(name, (size[0], size[1]), channels, norm), 0)
        assert network(torch.zeros(2, channels, *size)).shape == (2, 3), size


@pytest.mark.parametrize("name", NORMALISED)
def test_no_instance_is_normalised_over_one_pixel(name: str) -> None:
    """Instance normalisation never covers a single pixel, because only the bias would remain."""
    pixels: list[int] = []
    for side in (*range(8, 18), 31, 32, 33, 40, 64, 65, 96):
        network = build_network(spec_of(name, side, norm="instance"), 0)
        norms = [part for part in network.modules() if isinstance(part, InstanceNorm)]
        assert norms
        for norm in norms:
            norm.register_forward_pre_hook(lambda _, maps: pixels.append(maps[0].shape[2:].numel()))
        network(torch.zeros(1, 3, side, side))
    assert min(pixels) >= 4


# A convolution has inputs * outputs * side^2 weights, and a bias for each output unless a normalisation follows, which
# subtracts the mean. A normalisation has two numbers for each channel.
RESNET_3x3 = 64**2 * 4 + (64 * 128 + 128**2 * 3) + (128 * 256 + 256**2 * 3) + (256 * 512 + 512**2 * 3)
RESNET_1x1 = 64 * 128 + 128 * 256 + 256 * 512
RESNET_CHANNELS = 64 * 5 + 128 * 5 + 256 * 5 + 512 * 5
VGG_CHANNELS = 64 + 128 + 256 * 2 + 512 * 4
VGG_3x3 = 3 * 64 + 64 * 128 + 128 * 256 + 256**2 + 256 * 512 + 512**2 * 3
VIT_LAYER = 4 * 384 + 384 * 1152 + 1152 + 384 * 384 + 384 + 384 * 1536 + 1536 + 1536 * 384 + 384


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (published("resnet18", 3, 32, norm="batch"), 11_173_962),
        (published("resnet18", 3, 8), 9 * (192 + RESNET_3x3) + RESNET_1x1 + 2 * RESNET_CHANNELS + 5130),
        (published("resnet18", 3, 96, norm="batch"), 11_173_962 + (49 - 9) * 3 * 64),
        (published("resnet50", 3, 32, norm="batch"), 23_520_842),
        (published("resnet50", 3, 224, norm="batch"), 25_557_032 - 990 * 2049),
        (published("resnet101", 3, 224, norm="batch"), 44_549_160 - 990 * 2049),
        (published("mobilenet-v2", 3, 224, norm="batch"), 3_504_872 - 990 * 1281),
        (published("vgg11", 3, 32, norm="batch"), 9_231_114),
        (published("vgg11", 3, 96, norm="none"), 9 * VGG_3x3 + VGG_CHANNELS + 5130),
        (published("alexnet", 3, 32), 1_872_202),
        (published("lenet", 1, 28), 61_706),
        (published("lenet", 3, 32), 62_006),
        (published("mlp", 3, 32), 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        (published("mlp", 1, 8, depth=1), 650),
        (published("vit-small", 3, 32), 49 * 384 + 64 * 384 + 12 * VIT_LAYER + 768 + 3850),
    ],
    ids=lambda value: f"{value.architecture}-{value.size[0]}-{value.norm}" if isinstance(value, NetworkSpec) else "",
)
def test_networks_have_the_published_number_of_parameters(spec: NetworkSpec, count: int) -> None:
    """Networks have the published number of parameters, except in first and last layers for small images."""
    assert FlatNetwork(meta_network(spec)).count == count


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("resnet18", 65), ("resnet50", 32), ("resnet50", 65)])
def test_resnets_equal_torchvisions(name: str, size: int) -> None:
    """ResNets equal torchvision's; up to 64 pixels with another first convolution and no first pooling."""
    network = build_network(published(name, 3, size, norm="batch"), 0)
    reference = getattr(resnet, name)(num_classes=10)
    if size <= 64:
        reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        reference.maxpool = nn.Identity()
    require_equal(network, reference, size)


def test_resnet101_has_the_layers_of_torchvisions() -> None:
    """ResNet-101 has parameters of the shapes of torchvision's, in the same order."""
    with torch.device("meta"):
        reference = resnet.resnet101()
    spec = NetworkConfig(architecture="resnet101", norm="batch").for_images(3, (224, 224), 1000)
    assert FlatNetwork(meta_network(spec)).shapes == FlatNetwork(reference).shapes


@pytest.mark.parametrize("size", [32, 96])
def test_mobilenet_v2_equals_torchvisions(size: int) -> None:
    """MobileNetV2 equals torchvision's; up to 64 pixels the first convolution and the second stage halve nothing."""
    network = build_network(published("mobilenet-v2", 3, size, norm="batch"), 0)
    reference = mobilenet_v2(num_classes=10, dropout=0)
    if size <= 64:
        reference.features[0][0].stride = reference.features[2].conv[1][0].stride = (1, 1)
    require_equal(network, reference, size)


def require_equal(network: nn.Module, reference: nn.Module, size: int) -> None:
    """Fail unless both networks, given the same parameters in order, have the same logits in float64."""
    reference.double()
    unflatten_into(reference, flatten(network.double()))
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(network(images), reference(images), atol=1e-10, rtol=1e-9)


def test_vgg11_equals_torchvisions() -> None:
    """VGG-11 equals torchvision's: five poolings leave one pixel of 32."""
    network = build_network(published("vgg11", 3, 32, norm="batch"), 0)
    reference = nn.Sequential(vgg.make_layers(vgg.cfgs["A"], batch_norm=True), nn.Flatten(), nn.Linear(512, 10))
    unflatten_into(reference, flatten(network))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), reference(images), atol=1e-5, rtol=1e-4)


def test_vit_small_equals_torchvisions_encoder() -> None:
    """ViT-S maps tokens layer by layer as torchvision's encoder does."""
    network = build_network(spec_of("vit-small", width=128), 0)
    assert isinstance(network, SpatialNetwork)
    assert isinstance(network.features, nn.Sequential)
    embed, *layers, _ = network.features
    reference = vision_transformer.Encoder(
        64, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536, dropout=0, attention_dropout=0
    )
    ours = [parameter for layer in layers for parameter in layer.parameters()]
    torch.nn.utils.vector_to_parameters(
        torch.cat([embed.positions.flatten(), *(parameter.flatten() for parameter in ours)]), reference.parameters()
    )
    images = torch.randn(2, 3, 8, 8)
    patches = embed.patches(images).flatten(2).transpose(1, 2)
    maps, _ = spatial_features(network, images)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), reference(patches), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "norm"), UNCOUPLED)
def test_transforms_give_the_gradient_of_autograd(name: str, norm: str) -> None:
    """torch.func's gradient in the parameter vector equals autograd's, also for two vectors under vmap."""
    network, images, labels = make(name, norm)
    flat = FlatNetwork(network)

    def loss(theta: Tensor, images: Tensor) -> Tensor:
        return cross_entropy(flat(theta, images), labels)

    thetas = torch.stack([flatten(network), flatten(network) * 1.1])
    batches = torch.stack([images, images.flip(0) + 1])
    expected = []
    for theta, batch in zip(thetas, batches, strict=True):
        unflatten_into(network, theta)
        gradients = torch.autograd.grad(cross_entropy(network(batch), labels), list(network.parameters()))
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
    alone, together = grad(loss)(thetas[0], batches[0]), vmap(grad(loss))(thetas, batches)
    for gradient, reference in zip((alone, *together), (expected[0], *expected), strict=True):
        assert (gradient - reference).norm() <= 1e-9 * reference.norm()


@pytest.mark.parametrize("name", [*NORMALISED, *UNNORMALISED])
def test_gradients_can_be_matched(name: str) -> None:
    """The derivative of the gradient by a tangent and backwards, as in a student step, equals autograd's."""
    network, x, _ = make(name, "instance")
    theta = flatten(network)
    y, weights, v = torch.randn(3, 3).double(), torch.full((3,), 1 / 3).double(), torch.randn_like(theta)
    functions = StudentStepFunctions(FlatNetwork(network), StepOptions(compiled=False, order="reverse-over-forward"))
    values = functions.reverse(theta, x, y, weights, v)
    theta, x, y = (tensor.requires_grad_() for tensor in (theta, x, y))
    loss = soft_cross_entropy(FlatNetwork(network)(theta, x), y, weights)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    s = torch.dot(gradient, v)
    for value, reference in zip(values, (s, *torch.autograd.grad(s, (theta, x, y))), strict=True):
        assert (value - reference).norm() <= 1e-10 * reference.norm()


@pytest.mark.parametrize(("name", "norm"), VARIANTS)
def test_only_batch_norm_couples_samples(name: str, norm: str) -> None:
    """Only batch normalisation couples samples, also inside residual blocks."""
    assert couples_samples(meta_network(spec_of(name, norm=norm))) is (norm == "batch")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("convnet", (8, 16, 16)),
        ("resnet18", (512, 4, 4)),
        ("resnet50", (2048, 4, 4)),
        ("mobilenet-v2", (1280, 4, 4)),
        ("vgg11", (512, 2, 2)),
        ("alexnet", (192, 8, 8)),
        ("lenet", (16, 10, 10)),
        ("vit-small", (384, 8, 8)),
    ],
)
def test_spatial_features_are_the_last_maps(name: str, shape: tuple[int, ...]) -> None:
    """Spatial features are the maps before pooling; logits depend on them and stay the network's."""
    network = build_network(spec_of(name, 32, width=8 if name == "convnet" else 128), 0)
    images = torch.randn(2, 3, 32, 32)
    maps, logits = spatial_features(network, images)
    assert maps.shape == (2, *shape)
    torch.testing.assert_close(logits, network(images))
    (share,) = torch.autograd.grad(logits[:, 0].sum(), maps)
    assert share.flatten(1).norm(dim=1).gt(0).all()


@pytest.mark.parametrize("name", ["resnet18", "vit-small"])
def test_maps_that_are_averaged_are_weighted_by_the_last_layer(name: str) -> None:
    """The derivative of a logit in averaged maps is the last layer's weight at every place."""
    network = build_network(spec_of(name), 0)
    maps, logits = spatial_features(network, torch.randn(1, 3, 8, 8))
    (share,) = torch.autograd.grad(logits[0, 1], maps)
    weight = network.get_parameter("classifier.weight")[1]
    torch.testing.assert_close(share * maps[0, 0].numel(), weight[None, :, None, None].expand_as(maps))


def test_mlp_has_no_maps() -> None:
    """The MLP has no maps, because it flattens its images."""
    with pytest.raises(ConfigError, match=r"no feature maps.*mlp"):
        spatial_features(build_network(spec_of("mlp"), 0), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2", "vgg11", "alexnet", "lenet", "vit-small"])
def test_sizes_that_are_published_stay(name: str) -> None:
    """ConvNet's depth and pooling in the configuration do not change other architectures."""
    one = NetworkSpec(architecture=name, channels=1, size=(8, 8), classes=3)
    other = NetworkSpec(architecture=name, channels=1, size=(8, 8), classes=3, depth=9, pooling="max")
    assert torch.equal(flatten(build_network(one, 0)), flatten(build_network(other, 0)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet-v2", "vgg11", "alexnet", "vit-small"])
@pytest.mark.parametrize("width", [2, 32, 100])
def test_width_narrows_every_layer(name: str, width: int) -> None:
    """The width scales every layer except input and logits, so that parameters fall with its square."""
    full, narrow = (FlatNetwork(meta_network(spec_of(name, 16, width=each))).count for each in (128, width))
    if width == 2:
        assert narrow < full / 400
    else:
        assert (width / 128) ** 2 * 0.9 < narrow / full < (width / 128) ** 2 * 1.4
    network = build_network(spec_of(name, 16, width=width), 0)
    assert network(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("name", UNNORMALISED)
def test_an_unsupported_normalisation_is_refused(name: str) -> None:
    """An explicit normalisation that an architecture lacks is refused; the default becomes none."""
    shape = FlatNetwork(meta_network(spec_of(name, norm="none"))).shapes
    assert FlatNetwork(meta_network(spec_of(name, norm="instance"))).shapes == shape
    for norm in ("batch", "group"):
        with pytest.raises(ConfigError, match=rf"network.norm is '{norm}', but {name}.* Use network.norm=none"):
            meta_network(spec_of(name, norm=norm))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2", "vgg11", "alexnet", "lenet", "vit-small"])
def test_images_too_small_are_refused_with_the_least_size(name: str) -> None:
    """An image with one side too small is an error that names the least size."""
    with pytest.raises(
        ConfigError, match=rf"{name} takes images of at least 8x8 pixels, not 7x32\. Use dataset\.resize=8"
    ):
        meta_network(spec_of(name, (7, 32)))


@pytest.mark.parametrize(("size", "tokens"), [(8, 8), (12, 6), (28, 7), (30, 10), (32, 8), (64, 8), (96, 8), (128, 8)])
def test_vit_small_has_about_eight_tokens_a_side(size: int, tokens: int) -> None:
    """ViT-S has about eight tokens a side, of patches that divide the image."""
    network = meta_network(spec_of("vit-small", size, width=128))
    maps, _ = spatial_features(network, torch.empty(1, 3, size, size, device="meta"))
    assert maps.shape == (1, 384, tokens, tokens)


@pytest.mark.parametrize(("size", "remedy"), [(17, 16), (34, 32), (37, 40)])
def test_images_without_patches_are_refused_with_a_size_that_has_them(size: int, remedy: int) -> None:
    """A prime side, which no patch divides, is an error that names a size that works."""
    with pytest.raises(ConfigError, match=rf"{size}x{size} image .*\. Use dataset\.resize={remedy}\b"):
        meta_network(spec_of("vit-small", size))
    meta_network(spec_of("vit-small", remedy))
